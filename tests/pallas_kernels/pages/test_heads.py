"""A prompt's heads, from their product to the queries and the pages."""

import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import fp8_pages, ptx
from pallas_kernels.fp8_pages import Fp8Pages
from pallas_kernels.pages import PAGE
from pallas_kernels.partial_sum import PartialSum
from tests.oracles import fp8_numpy
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def _expected(parts_JTO, bias_O, angles, slots_T, pools, queries):
    """In NumPy: sums in float32, products exact, each number rounded to bfloat16 before the rotation and after it."""
    total_TO = parts_JTO[0]
    for each in [*parts_JTO[1:], *([] if bias_O is None else [bias_O.astype(np.float32)])]:
        total_TO = total_TO + each
    keys, width = pools[0].shape[1], pools[0].shape[3]
    heads_TRH = _rounded(total_TO).reshape(len(total_TO), -1, width)
    turned_TRH = heads_TRH
    if angles is not None:
        cos_T1H, sin_T1H = (each.astype(np.float64)[:, None] for each in angles)
        first, last = np.split(heads_TRH, 2, axis=-1)
        products = [(number * sin_T1H).astype(np.float32).astype(np.float64) for number in (last, first)]
        turned_TRH = np.concatenate((first * cos_T1H - products[0], last * cos_T1H + products[1]), axis=-1)
    out_TRH = np.concatenate((_rounded(turned_TRH)[:, : queries + keys], heads_TRH[:, queries + keys :]), axis=1)
    written = [jax.tree.map(np.array, pool) for pool in pools]
    for kind, pool in enumerate(written):
        new = out_TRH[:, queries + kind * keys :][:, :keys]
        if isinstance(pool, Fp8Pages):
            numbers, exponents = fp8_numpy.rounded(new)
            new = Fp8Pages(numbers.view(np.uint8), exponents + 127)
        for array, each in zip(jax.tree.leaves(pool), jax.tree.leaves(new), strict=True):
            for token, slot in enumerate(slots_T):
                if slot >= 0:
                    array[slot // PAGE, :, slot % PAGE] = each[token]
    return out_TRH[:, :queries], *written


def _operands(T, J, queries, keys, width, has_bias, rotates, fp8=False):
    rng = np.random.default_rng(T + width)
    columns, pages = (queries + 2 * keys) * width, 3
    parts_JTO = rng.standard_normal((J, T, columns)).astype(np.float32)
    bias_O = rng.standard_normal(columns).astype(ml_dtypes.bfloat16) if has_bias else None
    angle = rng.standard_normal((T, width // 2)) * 3
    angles = (np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)) if rotates else None
    slots_T = rng.permutation(pages * PAGE)[:T].astype(np.int32)
    slots_T[1::4] = -1
    pools = [rng.standard_normal((pages, keys, PAGE, width)).astype(ml_dtypes.bfloat16) for _ in range(2)]
    if fp8:
        pools = [jax.tree.map(np.array, fp8_pages.rounded(jnp.asarray(pool))) for pool in pools]
    return parts_JTO, bias_O, angles, slots_T, pools


def _given(parts_JTO, bias_O, angles, slots_T, pools):
    bias_EO = None if bias_O is None else jnp.asarray(bias_O)[None]
    rotation = None if angles is None else tuple(map(jnp.asarray, angles))
    return (
        PartialSum(jnp.asarray(parts_JTO), bias_EO=bias_EO),
        rotation,
        jnp.asarray(slots_T),
        *jax.tree.map(jnp.asarray, pools),
    )


CASES = [
    (21, 1, 8, 2, 64, True, True),
    (3, 2, 20, 1, 64, False, True),  # more heads than one warp's
    (6, 1, 3, 3, 128, True, False),
    (2, 1, 28, 4, 128, False, True),
    (9, 1, 8, 2, 64, True, True, True),  # float8
    (5, 2, 3, 3, 128, False, True, True),
]


@needs_mosaic
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_emulated_has_numpys_bits(case, monkeypatch):
    mosaic = importlib.import_module("pallas_kernels.append.heads_sm90")
    fp8_sm90 = importlib.import_module("pallas_kernels.formats.fp8_sm90")
    monkeypatch.setattr(ptx, "launch", launched(mosaic, fp8_sm90))
    operands = _operands(*case)
    given = _given(*operands)
    assert mosaic.supports(given[0], given[3])
    found = mosaic.append_heads.__wrapped__(*given)
    for one, other in zip(*map(jax.tree.leaves, (found, _expected(*operands, case[2]))), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float64), np.asarray(other, np.float64))


@needs_mosaic
@pytest.mark.parametrize("fp8", [False, True])
def test_the_kernel_lowers_and_writes_in_place(fp8):
    mosaic = importlib.import_module("pallas_kernels.append.heads_sm90")
    given = _given(*_operands(256, 1, 64, 8, 64, True, True, fp8))
    text = lowered(jax.jit(mosaic.append_heads, donate_argnums=(3, 4)), *given)
    assert text.count("custom_call @mosaic_gpu") == 1 and "scatter" not in text and "concatenate" not in text


@needs_hopper
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("case", [(384, 1, 64, 8, 64, True, True), (301, 1, 28, 4, 128, True, True)], ids=str)
def test_the_kernel_has_numpys_bits(case, fp8):
    mosaic = importlib.import_module("pallas_kernels.append.heads_sm90")
    operands = _operands(*case, fp8)
    found = mosaic.append_heads(*_given(*operands))
    for one, other in zip(*map(jax.tree.leaves, (found, _expected(*operands, case[2]))), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float64), np.asarray(other, np.float64))
