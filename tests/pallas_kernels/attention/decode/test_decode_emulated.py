"""Decode attention for Hopper, emulated on a CPU: against float64, and that a row's bits do not depend on the deal.

The emulator shows who computes what and in which order; what ptxas makes of it, only a GPU does (see
`test_decode_over_pages.py`).
"""

import dataclasses
import importlib
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pages, ptx
from pallas_kernels.fp8_pages import Fp8Pages
from tests.oracles import attention_numpy, fp8_numpy
from tests.oracles.paged import paged
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic
from tests.thinned import thinned, thorough

pytestmark = needs_mosaic
_MODULES = ["combine", "gather", "merge", "mosaic", "newest", "slots", "turns", "warp"]


class Shape(NamedTuple):
    """Of a model's attention."""

    N: int
    K: int
    H: int
    window: int | None = None


class Row(NamedTuple):
    """What a row is given: queries [N, H], and the pages that it sees."""

    q_NH: np.ndarray
    k_YKSH: np.ndarray
    v_YKSH: np.ndarray
    table_1Z: np.ndarray
    count: int
    start: int | None
    sinks_N: np.ndarray | None
    expected_NH: np.ndarray


def _row(shape: Shape, position: int, sinks: Any = jnp.float32) -> Row:
    rng = np.random.default_rng(position)
    N, K, H, window = shape
    span = max(0, position + 1 - (window or 1 << 30)), position + 1
    given = paged([span], K=K, H=H, dtype=jnp.bfloat16, pages=position // pages.PAGE + 1)
    q = np.asarray(jnp.asarray(rng.standard_normal((1, 1, N, H), np.float32), jnp.bfloat16))
    sinks_N = None if sinks is None else np.asarray(jnp.asarray(rng.standard_normal(N) * 2, sinks))
    contiguous = q, given.k_BKSH, given.v_BKSH, np.array([[position]]), given.positions_BS, sinks_N
    expected = attention_numpy.attention(*contiguous, scale=1 / math.sqrt(H), window=window)
    table, start, count = given.table_BZ, None, position + 1
    if window is not None and window < table.shape[1] * pages.PAGE:
        table, *ends = (np.asarray(each) for each in pages.window(table, np.array([position]), window))
        start, count = (int(each[0]) for each in ends)
    return Row(q[0, 0], given.k_YKSH, given.v_YKSH, table, count, start, sinks_N, np.asarray(expected)[0, 0])


def _plan(shape: Shape, row: Row, rows: int, **settings: int) -> Any:
    from pallas_kernels.attention.decode import mosaic_sm90, plan_sm90

    Z = row.table_1Z.shape[1]
    is_folded = row.start is not None and shape.window is not None and shape.window <= pages.PAGE
    plan = plan_sm90.DecodePlan(
        keys=shape.K,
        group=shape.N // shape.K,
        width=shape.H,
        places=pages.PAGE * (1 if is_folded else Z),
        warp_tile=mosaic_sm90.warp_tile(shape.H),
        scale=1 / math.sqrt(shape.H),
        sinks=None if row.sinks_N is None else row.sinks_N.dtype.name,
        pages=Z,
        windowed=row.start is not None,
        folded=is_folded,
    )
    return dataclasses.replace(plan_sm90.deal(plan, rows * shape.K), **settings)


def _emulated(monkeypatch: Any, plan: Any, row: Row) -> np.ndarray:
    """What the kernels write: [N, H]."""
    modules = [importlib.import_module(f"pallas_kernels.attention.decode.{name}_sm90") for name in _MODULES]
    modules.append(importlib.import_module("pallas_kernels.formats.fp8_sm90"))
    monkeypatch.setattr(ptx, "launch", launched(*modules))
    starts_1 = None if row.start is None else np.array([row.start], np.int32)
    given = {"q": row.q_NH[None]}, row.k_YKSH, row.v_YKSH, np.array([row.count], np.int32), row.sinks_N
    decode = importlib.import_module("pallas_kernels.attention.decode.mosaic_sm90")._decode.__wrapped__
    return decode(*given, row.table_1Z.astype(np.int32), starts_1, plan=plan)[0][0]


def _same(monkeypatch: Any, shape: Shape, row: Row, plans: dict[str, Any]) -> np.ndarray:
    """The bits that all of these plans give."""
    found = {name: _emulated(monkeypatch, plan, row) for name, plan in plans.items()}
    first, *others = found.items()
    tolerance = 4 * 1.2e-7 * (math.sqrt(shape.H) + math.sqrt(row.count) + 2) + 2 * 2**-7
    np.testing.assert_allclose(first[1].astype(np.float64), row.expected_NH, rtol=0, atol=tolerance)
    for name, each in others:
        np.testing.assert_array_equal(each.view(np.uint16), first[1].view(np.uint16), err_msg=f"{first[0]} and {name}")
    return first[1]


SHAPES = {
    "gpt-oss": Shape(8, 1, 64),
    "its window": Shape(8, 1, 64, 128),
    "a long window": Shape(8, 1, 64, 300),
    "gpt2": Shape(2, 2, 64),
    "llama": Shape(4, 1, 128),
    "its short window": Shape(4, 1, 128, 100),
    "qwen": Shape(7, 1, 128),
    "three times the width": Shape(5, 1, 192),
    "sixteen queries": Shape(16, 1, 64),
    "twenty queries": Shape(20, 1, 64),
}
COUNTS = [1, 31, 32, 33, 127, 128, 129, 700, 1025, 2047, 2048, 2049]
ALL_COUNTS = ("gpt-oss", "its window")  # the other shapes have some
CASES = [(name, count) for name in SHAPES for count in (COUNTS if name in ALL_COUNTS else (33, 700, 2049))]
KEPT = [(name, count) for name in ALL_COUNTS for count in (33, 129, 2049)] + [("llama", 33), ("llama", 2049)]
ROWS = (1, 2, 3, 8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    ("name", "count"),
    [case if case in KEPT else thorough(*case) for case in CASES],
)
def test_bits_do_not_depend_on_the_number_of_rows(name, count, monkeypatch):
    """With models' numbers of heads, of which this computes one or two."""
    shape = SHAPES[name]
    row = _row(shape, count - 1)
    heads = 8 // shape.K
    plans = {plan: f"{rows} rows" for rows in ROWS for plan in [_plan(shape, row, rows * heads)]}
    _same(monkeypatch, shape, row, {name: plan for plan, name in plans.items()})


@pytest.mark.parametrize("name", thinned(SHAPES, "gpt-oss"))
def test_bits_do_not_depend_on_settings(name, monkeypatch):
    """Each number of splits with each of blocks and of warps; which number of warps comes with both, by the count."""
    shape = SHAPES[name]
    for which, count in enumerate((45, 700)):
        row = _row(shape, count - 1, sinks=None)
        settings = [
            {"splits": splits, "blocks": blocks, "warps": (4, 8)[(i + j + which) % 2]}
            for i, splits in enumerate((1, 3, 16))
            for j, blocks in enumerate((1, 2, 4, 8))
        ]
        plans = {str(each): _plan(shape, row, 1, **each) for each in settings}
        _same(monkeypatch, shape, row, {name: plan for name, plan in plans.items() if plan.fits})


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt-oss", 100),
        thorough("gpt-oss", 4095),
        thorough("gpt-oss", 4096),
        ("gpt-oss", 4097),
        thorough("gpt-oss", 9000),
        thorough("llama", 4097),
        thorough("qwen", 9000),
    ],
)
def test_bits_do_not_depend_on_the_width_of_the_table(name, count, monkeypatch):
    """From one cluster to several ranges, one after the other in a block, or shared by clusters and combined."""
    shape, found, plans = SHAPES[name], set(), []
    narrow = _row(shape, count - 1)
    for more in (0, 40, 400):
        row = narrow._replace(table_1Z=np.pad(narrow.table_1Z, ((0, 0), (0, more))))
        some = {f"{rows} rows": _plan(shape, row, rows) for rows in (1, 64, 2048)}
        found.add(_same(monkeypatch, shape, row, some).tobytes())
        plans += some.values()
    assert len(found) == 1
    assert {plan.splits for plan in plans} >= {1, 32} and any(plan.loops for plan in plans)


FP8 = [("gpt-oss", 33), ("gpt-oss", 4097), ("its window", 129), ("a long window", 700)]
FP8 += [thorough("llama", 700), thorough("qwen", 31), thorough("twenty queries", 2049)]


@pytest.mark.parametrize(("name", "count"), FP8)
def test_pages_in_float8_give_the_bits_of_rounded_numbers(name, count, monkeypatch):
    shape = SHAPES[name]
    row = _row(shape, count - 1)
    pools = row.k_YKSH, row.v_YKSH
    plain = row._replace(**dict(zip(("k_YKSH", "v_YKSH"), map(_as_read, pools), strict=True)))
    packed = row._replace(**dict(zip(("k_YKSH", "v_YKSH"), map(_packed, pools), strict=True)))
    for rows in (1, 64):
        plan = _plan(shape, row, rows)
        expected = _emulated(monkeypatch, plan, plain)
        found = _emulated(monkeypatch, dataclasses.replace(plan, fp8=True), packed)
        np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
        assert np.isfinite(found.astype(np.float32)).all()
        assert np.abs(found.astype(np.float64) - row.expected_NH).max() < 0.2


def _as_read(pool_YKSH: np.ndarray) -> np.ndarray:
    return fp8_numpy.as_read(pool_YKSH).astype(pool_YKSH.dtype)


def _packed(pool_YKSH: np.ndarray) -> Fp8Pages:
    """With the worst that there may be where nobody looks: numbers of NaN, with an infinite scale."""
    numbers, exponents = fp8_numpy.rounded(pool_YKSH)
    exponents = np.where(np.isnan(pool_YKSH).any(axis=-1, keepdims=True), 255, exponents + 127)
    return Fp8Pages(numbers.view(np.uint8), exponents.astype(np.uint8))


def test_nothing_is_seen(monkeypatch):
    for name in ("gpt-oss", "its window"):
        row = _row(SHAPES[name], 300)._replace(count=0, expected_NH=np.zeros((8, 64)))
        plans = {f"{rows} rows": _plan(SHAPES[name], row, rows) for rows in (1, 1000)}
        plans["splits"] = _plan(SHAPES[name], row, 1, splits=4)
        assert not _same(monkeypatch, SHAPES[name], row, plans).astype(np.float32).any()
