"""Tries kernels' settings and keeps the fastest."""

import dataclasses
import datetime
import importlib
import math
from collections.abc import Iterable, Iterator
from typing import Final

import jax
import numpy as np

from gptjax.bench.cases import Case
from gptjax.bench.figure import Figure
from gptjax.bench.kernels import NotRun, expected_result, measure
from pallas_kernels import dispatch, tiles

_WRONG: Final = 4  # settings whose error is this many times the smallest are wrong


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Settings that were tried. `pallas_kernels.tiles` defines the protocol for tunable kernels."""

    key: tiles.Key
    settings: tiles.Settings
    call: Figure
    error: float


def tune(case: Case, implementation: str, *, repeats: int) -> Iterator[Attempt | NotRun]:
    """Tries the settings of every key that the implementation asks `tiles.lookup` for, one key after another."""
    taken: dict[tiles.Key, tiles.Settings] = {}
    try:
        x, (operands,) = jax.eval_shape(lambda: (case.x(1), case.copies(1, implementation)))
        with tiles.trial({}) as asked:
            jax.eval_shape(lambda x, operands: case.call(x, operands, implementation), x, operands)
    except Exception as error:  # whatever a kernel under trial raises: the others go on
        yield NotRun.of(case, implementation, error)
        return
    candidates = {key: _tunable(key) for key in asked}
    expected = expected_result(case) if any(candidates.values()) else np.empty(0)
    for key, tried in candidates.items():
        attempts = []
        for settings in tried:
            try:
                with tiles.trial({**taken, key: settings}):
                    call, difference, _ = measure(case, implementation, expected, repeats=repeats)
            except Exception as error:  # such as too little shared memory
                unfit = NotRun.of(case, implementation, error)
                yield dataclasses.replace(unfit, reason=f"{settings}: {unfit.reason}")
            else:
                attempts.append(Attempt(key, settings, call, difference))
                yield attempts[-1]
        taken |= {entry.key: entry.settings for entry in fastest(attempts)}


def _tunable(key: tiles.Key) -> list[tiles.Settings]:
    operation, shape = key
    module = importlib.import_module(dispatch.module(operation))
    return module.tunable(dict(shape)) if hasattr(module, "tunable") else []


def fastest(attempts: Iterable[Attempt]) -> list[tiles.Entry]:
    """The fastest settings for each key, except those with an error many times that of others."""
    by_key: dict[tiles.Key, list[Attempt]] = {}
    for attempt in attempts:
        if math.isfinite(attempt.error):
            by_key.setdefault(attempt.key, []).append(attempt)
    entries = []
    for (operation, shape), tried in by_key.items():
        least = min(attempt.error for attempt in tried)
        best = min((each for each in tried if each.error <= _WRONG * least), key=lambda each: each.call.median)
        measured = round(1e6 * best.call.median, 2), datetime.date.today().isoformat(), jax.__version__
        entries.append(tiles.Entry(operation, dict(shape), best.settings, *measured))
    return entries
