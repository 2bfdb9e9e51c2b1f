"""Decode attention that also appends has the bits of its steps one by one: emulated on a CPU, and run on a Hopper GPU.

In these pages, the newest places and all that no row sees are NaN.
"""

import importlib
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pages, ptx
from pallas_kernels.append import write_rows
from pallas_kernels.attention import api
from pallas_kernels.fp8_pages import Fp8Pages, expanded
from pallas_kernels.pages import PAGE
from pallas_kernels.partial_sum import PartialSum
from tests.oracles import fp8_numpy
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic
from tests.thinned import thorough

pytestmark = needs_mosaic
EPSILON = 1e-5
ROUNDING = float(jnp.finfo(jnp.bfloat16).eps) / 2
_MODULES = ["combine", "gather", "merge", "mosaic", "newest", "slots", "turns", "warp"]


class Case(NamedTuple):
    """Sizes, by `gptjax.axes`; the rows' positions, of which -1 is no token; and how heads come from the product."""

    N: int
    K: int
    H: int
    positions: list[int]
    window: int | None = None
    norm: Any = None  # dtype of its scales
    rotates: bool = True
    bias: Any = jnp.bfloat16
    pieces: int = 2
    sinks: bool = True
    pages: int | None = None  # of a table
    settings: Mapping[str, int] = MappingProxyType({})
    fp8: bool = False  # the pages


NEW_PAGES = [0, 127, 128, 255, 256, 31, 32, -1]
CASES = {
    "gpt-oss": Case(8, 1, 64, [300, *NEW_PAGES], pieces=3),
    "its window": Case(8, 1, 64, [130, 383, *NEW_PAGES], 128, pieces=3),
    "a short window": Case(4, 2, 64, [130, 0, 128], 10, bias=None, sinks=False),
    "a short window, wide heads": Case(4, 1, 128, [200, 5, *NEW_PAGES], 100),
    "a long window": Case(8, 1, 64, [300, 700, 128], 300),
    "a long window, normed": Case(4, 1, 128, [700, 511], 300, jnp.float32, bias=jnp.float32),
    "llama": Case(4, 1, 128, [400, 64, -1], bias=None, sinks=False),
    "qwen": Case(7, 1, 128, [400, 129], pieces=4, sinks=False),
    "qwen3": Case(4, 2, 128, [200, 64, -1], norm=jnp.bfloat16, bias=None, sinks=False),
    "narrow, normed": Case(4, 1, 64, [200, 3], norm=jnp.bfloat16),
    "wide, normed": Case(2, 1, 256, [190, -1], norm=jnp.bfloat16),
    "three times the width": Case(5, 1, 192, [190, 16]),
    "gpt2": Case(2, 2, 64, [200, 31], rotates=False, pieces=6, sinks=False),
    "twenty queries": Case(20, 1, 64, [200, 31]),
    "twenty queries, splits of clusters": Case(20, 1, 64, [200, 127], settings={"splits": 3, "blocks": 2}),
    "one block": Case(8, 1, 64, [700, 33, 511], settings={"splits": 1, "blocks": 1}),
    "a cluster of large blocks": Case(8, 1, 64, [700, 33, 511], settings={"splits": 1, "blocks": 8, "warps": 8}),
    "splits": Case(8, 1, 64, [700, 33, 511], settings={"splits": 16, "blocks": 1, "warps": 4}),
    "ranges in turn": Case(8, 1, 64, [4500, 4095, 300], pages=70, settings={"splits": 1, "blocks": 1}),
    "ranges, combined": Case(8, 1, 64, [4500, 4096], pages=70),
    "float8": Case(8, 1, 64, [300, *NEW_PAGES], pieces=3, fp8=True),
    "float8, a window": Case(8, 1, 64, [130, 383, *NEW_PAGES], 128, pieces=3, fp8=True),
    "float8, a long window": Case(8, 2, 64, [300, 700, 128, 3], 300, fp8=True),
    "float8, wide, normed": Case(4, 2, 128, [200, 64, -1], norm=jnp.bfloat16, bias=None, sinks=False, fp8=True),
    "float8, splits": Case(20, 1, 64, [700, 33, 512], settings={"splits": 3, "blocks": 2}, fp8=True),
    "float8, three times the width": Case(5, 1, 192, [190, 17], fp8=True),
}
QUICK = ("gpt-oss", "its window", "a short window, wide heads", "qwen3", "twenty queries, splits of clusters")
QUICK += ("float8", "float8, a window", "float8, wide, normed")


class Given(NamedTuple):
    """The operands of `api.append_and_attend`, in NumPy."""

    parts_JAO: np.ndarray
    bias_EO: np.ndarray | None
    rotation: tuple[np.ndarray, np.ndarray] | None
    positions_B: np.ndarray
    k_YKSH: Any
    v_YKSH: Any
    table_BZ: np.ndarray
    sinks_N: np.ndarray | None
    scales: tuple[np.ndarray, np.ndarray] | None

    def run(self, case: Case, positions_B: Any, k_YKSH: Any, v_YKSH: Any) -> Any:
        """By the kernel."""
        qkv = PartialSum(jnp.asarray(self.parts_JAO), bias_EO=self.bias_EO)
        more = {"scale": case.H**-0.5, "window": case.window, "scales": self.scales, "epsilon": EPSILON}
        operands = qkv, self.rotation, positions_B, k_YKSH, v_YKSH, self.table_BZ, self.sinks_N
        return api.append_and_attend(*operands, **more)


def _given(case: Case) -> Given:
    rng, B = np.random.default_rng(7), len(case.positions)
    Z, columns = case.pages or max(case.positions) // PAGE + 1, (case.N + 2 * case.K) * case.H

    def numbers(*shape: int, dtype: Any = jnp.float32) -> np.ndarray:
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype))

    pools = [numbers(1 + B * Z, case.K, PAGE, case.H, dtype=jnp.bfloat16) for _ in "kv"]
    table = (1 + rng.permutation(B * Z)).reshape(B, Z).astype(np.int32)
    for row, position in enumerate(case.positions):
        places = np.arange(Z * PAGE).reshape(Z, PAGE)
        block, place = np.nonzero((places >= position) | (places < position + 1 - (case.window or 1 << 30)))
        for pool in pools:
            pool[table[row, block], :, place] = np.nan
    pools = [_packed(pool) if case.fp8 else pool for pool in pools]
    angle = rng.uniform(-3, 3, (B, case.H // 2)).astype(np.float32)
    return Given(
        numbers(case.pieces, B, columns),
        None if case.bias is None else numbers(1, columns, dtype=case.bias),
        (np.cos(angle), np.sin(angle)) if case.rotates else None,
        np.asarray(case.positions, np.int32),
        *pools,
        table,
        2 * numbers(case.N) if case.sinks else None,
        None if case.norm is None else (numbers(case.H, dtype=case.norm), numbers(case.H, dtype=case.norm)),
    )


def _packed(x: np.ndarray) -> Fp8Pages:
    numbers, exponents = fp8_numpy.rounded(x)
    exponents = np.where(np.isnan(x).any(axis=-1, keepdims=True), 255, exponents + 127)
    return Fp8Pages(numbers.view(np.uint8), exponents.astype(np.uint8))


def _rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16, as float32."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def _fma(a: np.ndarray, b: Any, c: Any) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _heads(case: Case, given: Given, fma: Any = _fma, kind: Any = np.float32) -> list[np.ndarray]:
    """Queries [B, N, H], keys and values [B, K, H] as their pages hold them: to the bit, or in float64."""
    total = given.parts_JAO[0].astype(kind)
    for part in given.parts_JAO[1:]:
        total = total + part
    if given.bias_EO is not None:
        total = total + _rounded(given.bias_EO)
    heads = _rounded(total).astype(kind).reshape(len(total), -1, case.H)
    turned = heads[:, : case.N + case.K]
    if given.scales is not None:
        first, last = np.split(turned, 2, axis=-1)
        squares = fma(last, last, first * first).reshape(*turned.shape[:2], -1, 32)
        for distance in (16, 8, 4, 2, 1):
            squares = squares + squares[..., np.arange(32) ^ distance]
        sums = [*np.moveaxis(squares[..., 0], -1, 0)]
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        mean = fma(sums[0], kind(1 / case.H), kind(EPSILON))
        scales = np.repeat(np.asarray(given.scales, kind), [case.N, case.K], axis=0)
        turned = _rounded(turned * (kind(1) / np.sqrt(mean))[..., None] * scales).astype(kind)
    if given.rotation is not None:
        first, last = np.split(turned, 2, axis=-1)
        cos, sin = (each.astype(kind)[:, None] for each in given.rotation)
        turned = np.concatenate((fma(first, cos, -(last * sin)), fma(last, cos, first * sin)), axis=-1)
    return [turned[:, : case.N], turned[:, case.N :], heads[:, case.N + case.K :]]


def _written(given: Given, k_BKH: np.ndarray, v_BKH: np.ndarray) -> list[np.ndarray]:
    """The pools with the new keys and values."""
    slots = np.asarray(pages.slots(given.table_BZ, given.positions_B[:, None]))[:, 0]
    pools = [jax.tree.map(np.array, pool) for pool in (given.k_YKSH, given.v_YKSH)]
    for pool, new in zip(pools, (k_BKH, v_BKH), strict=True):
        new = _packed(new) if isinstance(pool, Fp8Pages) else new
        for array, numbers in zip(jax.tree.leaves(pool), jax.tree.leaves(new), strict=True):
            for row in np.nonzero(slots >= 0)[0]:
                array[slots[row] // PAGE, :, slots[row] % PAGE] = numbers[row]
    return pools


def _bits(x: Any) -> Any:
    return jax.tree.map(lambda array: np.asarray(array).view(np.uint8), x)


@pytest.mark.parametrize("name", [name if name in QUICK else thorough(name) for name in CASES])
def test_the_same_bits_as_step_by_step(name, monkeypatch):
    decode = importlib.import_module("pallas_kernels.attention.decode.mosaic_sm90")
    modules = [importlib.import_module(f"pallas_kernels.attention.decode.{each}_sm90") for each in _MODULES]
    modules.append(importlib.import_module("pallas_kernels.formats.fp8_sm90"))
    monkeypatch.setattr(ptx, "launch", launched(*modules))
    monkeypatch.setattr(decode, "_decode", decode._decode.__wrapped__)
    case = CASES[name]
    for kernel in ("decode", "decode_newest"):
        monkeypatch.setattr(decode, kernel, partial(getattr(decode, kernel), **case.settings))
    given = _given(case)
    pools = [jax.tree.map(jnp.asarray, pool) for pool in (given.k_YKSH, given.v_YKSH)]
    out, *written = given.run(case, given.positions_B, *pools)

    q, k, v = (np.asarray(jnp.asarray(each, jnp.bfloat16)) for each in _heads(case, given))
    expected = _written(given, k, v)
    jax.tree.map(np.testing.assert_array_equal, *map(_bits, (written, expected)))
    operands = q[:, None], *expected, given.table_BZ, given.positions_B[:, None], given.sinks_N
    alone = api._decode_pages(decode.decode, *operands, scale=case.H**-0.5, window=case.window)
    np.testing.assert_array_equal(_bits(out), _bits(alone[:, 0]))
    assert np.isfinite(out.astype(np.float32)).all() and not out[given.positions_B < 0].astype(np.float32).any()
    # The sums and their order above are the kernel's own; what they mean is this.
    exact = _heads(case, given, lambda a, b, c: a * b + c, np.float64)
    for each, mean in zip((q, k, v), exact, strict=True):  # what is just between two numbers may be rounded to either
        np.testing.assert_allclose(each.astype(np.float64), mean, rtol=2 * ROUNDING, atol=8 * ROUNDING)


LOWERED = {
    "gpt-oss": Case(64, 8, 64, [511] * 8, pieces=3),
    "one row": Case(64, 8, 64, [511], pieces=3),
    "its window": Case(64, 8, 64, [511] * 8, 128, pieces=3),
    "qwen3": Case(32, 8, 128, [511], norm=jnp.bfloat16, bias=None, sinks=False),
    "gpt2": Case(12, 12, 64, [511] * 9, rotates=False, pieces=6, sinks=False),
    "gpt-oss in float8": Case(64, 8, 64, [511] * 8, pieces=3, fp8=True),
    "its window in float8": Case(64, 8, 64, [511], 128, pieces=3, fp8=True),
}


@pytest.mark.parametrize("name", LOWERED)
def test_one_kernel_lowers_and_updates_the_pages_in_place(name):
    case = LOWERED[name]
    given = _given(case)
    text = lowered(partial(given.run, case), given.positions_B, given.k_YKSH, given.v_YKSH)
    assert text.count("custom_call @mosaic_gpu") == 1 and "decode_attention" in text
    assert "output_operand_aliases" in text


@needs_hopper
@pytest.mark.parametrize("name", [*CASES, *LOWERED])
def test_the_same_bits_as_step_by_step_on_a_gpu(name):
    """As `decode` gives after XLA has written what the kernel wrote, and that agrees with float64."""
    from pallas_kernels.attention.decode import mosaic_sm90

    case = {**CASES, **LOWERED}[name]._replace(settings={})
    given = _given(case)
    out, *written = jax.jit(partial(given.run, case))(given.positions_B, given.k_YKSH, given.v_YKSH)
    exact = _heads(case, given, lambda a, b, c: a * b + c, np.float64)
    slots = np.asarray(pages.slots(given.table_BZ, given.positions_B[:, None]))[:, 0]
    exists = slots >= 0
    before, after = (given.k_YKSH, given.v_YKSH), []
    for pool, each, mean in zip(before, written, exact[1:], strict=True):
        new = np.asarray(expanded(each, jnp.bfloat16))[slots // PAGE, :, slots % PAGE]
        near = (
            {"rtol": 2**-4 + 4 * ROUNDING, "atol": 2**-6} if case.fp8 else {"rtol": 4 * ROUNDING, "atol": 8 * ROUNDING}
        )
        np.testing.assert_allclose(new.astype(np.float64)[exists], mean[exists], **near)
        pool = jax.tree.map(jnp.asarray, pool)
        after.append(write_rows(pool, jnp.asarray(new), given.table_BZ, given.positions_B))
        # As numbers: what was rounded may fit a smaller scale, if its largest number became 448.
        both = (np.asarray(expanded(pages, jnp.bfloat16).astype(jnp.float32)) for pages in (each, after[-1]))
        np.testing.assert_array_equal(*both)
    # Queries are not written anywhere. Those of this order of sums may be rounded otherwise in a few places.
    q = jnp.asarray(_heads(case, given)[0], jnp.bfloat16)[:, None]
    attend = partial(api._decode_pages, mosaic_sm90.decode, scale=case.H**-0.5, window=case.window)
    alone = jax.jit(attend)(q, *after, given.table_BZ, given.positions_B[:, None], given.sinks_N)[:, 0]
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(alone, np.float32), rtol=0, atol=8 * ROUNDING)
    if given.scales is None:  # only a norm's root is approximated
        np.testing.assert_array_equal(_bits(out), _bits(alone))
