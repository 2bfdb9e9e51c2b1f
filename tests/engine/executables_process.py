"""Calls two small programs as an executor does, in a process of its own. Prints what was traced, and the results.

python -m tests.engine.executables_process
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine.executables import Executables
from gptjax.engine.flat_params import FlatParams
from gptjax.support import runtime


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """A pytree of our own."""

    first: jax.Array
    second: tuple[jax.Array, None]
    name: str = dataclasses.field(metadata={"static": True})


TRACED: list[str] = []


@partial(jax.jit, static_argnames=("power",), donate_argnames=("pair",))
def mixed(params: FlatParams, pair: Pair, factor: jax.Array, power: int) -> tuple[jax.Array, Pair]:
    """Adds up in an order that XLA chooses."""
    TRACED.append(f"mixed {power}")
    product = jnp.dot(pair.first, params.nested()["kernel"]) ** power * factor
    return jnp.sin(product).sum(), dataclasses.replace(pair, first=product / 7)


@jax.jit
def counted(pair: Pair) -> dict[str, jax.Array]:
    """Takes no parameters."""
    TRACED.append("counted")
    return {"mean": pair.first.mean(), "second": pair.second[0]}


def made() -> tuple[FlatParams, Pair]:
    """The same numbers in every process."""
    random = np.random.default_rng(0)
    params = FlatParams.of({"kernel": jnp.asarray(random.normal(size=(33, 33)), jnp.float32)})
    return params, Pair(jnp.asarray(random.normal(size=(5, 33)), jnp.float32), (jnp.arange(3), None), "a")


def results() -> list[float]:
    """What the programs return."""
    params, pair = made()
    call, found = Executables(params), []
    for power in (1, 2, 1):
        total, pair = call(mixed, params, pair, np.float32(1.5), power)
        counts = call(counted, pair)
        found += [float(total), float(counts["mean"]), *counts["second"].tolist(), *pair.first.ravel().tolist()]
    return found


if __name__ == "__main__":
    runtime.enable_compilation_cache()
    kept = runtime.executables_directory()
    json.dump({"results": results(), "traced": TRACED, "directory": str(kept)}, sys.stdout)
    assert kept is None or Path(kept).is_dir()
