"""On a Hopper GPU, a row's decode attention has the same bits alone and among others, in any table, however dealt."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pages
from pallas_kernels.attention import api
from pallas_kernels.attention.decode import mosaic_sm90
from tests.oracles import attention_numpy
from tests.pallas_kernels.marks import needs_hopper

pytestmark = needs_hopper
COUNTS = [1, 31, 32, 33, 127, 128, 129, 600, 2047, 2048, 2049]
LONG = [4095, 4096, 4097, 8193, 40_000]
NARROW, WIDE = 17, 320  # pages of a table


class Shape(NamedTuple):
    """Of a model's attention; and in how many rows it is tried."""

    N: int
    K: int
    H: int
    window: int | None = None
    sinks: Any = None
    rows: tuple[int, ...] = (1, 3, 8, 32, 128)
    wide: bool = False  # whether also in wide tables


SHAPES = {
    "gpt-oss": Shape(64, 8, 64, sinks=jnp.bfloat16, rows=(1, 2, 3, 8, 16, 32, 64, 128), wide=True),
    "its windows": Shape(64, 8, 64, 128, jnp.bfloat16, wide=True),
    "long windows": Shape(64, 8, 64, 300, jnp.float32),
    "gpt2": Shape(12, 12, 64, rows=(1, 8, 128)),
    "llama": Shape(32, 8, 128, rows=(1, 2, 8, 32, 128), wide=True),
    "short windows": Shape(32, 8, 128, 100, rows=(1, 32)),
    "qwen": Shape(28, 4, 128, rows=(1, 2, 8, 64)),
    "three times the width": Shape(5, 1, 192, rows=(1, 64)),
    "sixteen queries": Shape(32, 2, 64, sinks=jnp.float32, rows=(1, 16, 128)),
    "more queries than a block has room for": Shape(40, 2, 64, rows=(1, 128)),
}


class Given(NamedTuple):
    """A pool, and what a row has of it."""

    q_NH: jax.Array
    k_YKSH: jax.Array
    v_YKSH: jax.Array
    table_Z: np.ndarray
    sinks_N: jax.Array | None


def _given(shape: Shape, pages_of_table: int) -> Given:
    keys = jax.random.split(jax.random.key(7), 4)
    pool = 1 + pages_of_table, shape.K, pages.PAGE, shape.H
    table = 1 + np.random.default_rng(3).permutation(pages_of_table)
    return Given(
        jax.random.normal(keys[0], (shape.N, shape.H), jnp.bfloat16),
        *(jax.random.normal(key, pool, jnp.bfloat16) for key in keys[1:3]),
        table.astype(np.int32),
        None if shape.sinks is None else (2 * jax.random.normal(keys[3], (shape.N,))).astype(shape.sinks),
    )


def _attended(
    shape: Shape, given: Given, count: int, rows: int, Z: int, settings: dict[str, int] | None = None
) -> np.ndarray:
    """The bits of the row, the last but one among others that have other queries, lengths and pages."""
    rng = np.random.default_rng(rows)
    place = max(rows - 2, 0)
    q = rng.standard_normal((rows, 1, shape.N, shape.H), np.float32)
    table = rng.integers(1, len(given.k_YKSH), (rows, Z)).astype(np.int32)
    positions = rng.integers(-1, Z * pages.PAGE, (rows, 1)).astype(np.int32)
    table[place], positions[place] = given.table_Z[:Z], count - 1
    q_B1NH = jnp.asarray(q, jnp.bfloat16).at[place, 0].set(given.q_NH)
    operands = q_B1NH, given.k_YKSH, given.v_YKSH, jnp.asarray(table), jnp.asarray(positions), given.sinks_N
    out = _kernel(shape, tuple(sorted((settings or {}).items())))(*operands)
    return np.asarray(out[place, 0]).view(np.uint16)


_KERNELS: dict[Any, Any] = {}


def _kernel(shape: Shape, settings: tuple[tuple[str, int], ...]) -> Any:
    key = shape, settings
    if key not in _KERNELS:
        kernel = partial(mosaic_sm90.decode, **dict(settings))
        _KERNELS[key] = jax.jit(partial(api._decode_pages, kernel, scale=shape.H**-0.5, window=shape.window))
    return _KERNELS[key]


def _check(shape: Shape, given: Given, count: int, bits: np.ndarray) -> None:
    """Against float64."""
    table = given.table_Z[: -(-count // pages.PAGE)]
    k, v = (np.asarray(pool[table].swapaxes(0, 1), np.float64) for pool in (given.k_YKSH, given.v_YKSH))
    k, v = (each.reshape(1, shape.K, -1, shape.H) for each in (k, v))
    q = np.asarray(given.q_NH, np.float64)[None, None]
    positions_1S = np.arange(k.shape[2])[None]
    sinks = None if given.sinks_N is None else np.asarray(given.sinks_N, np.float64)
    operands = q, k, v, np.array([[count - 1]]), np.where(positions_1S < count, positions_1S, -1), sinks
    expected = attention_numpy.attention(*operands, scale=shape.H**-0.5, window=shape.window)[0, 0]
    tolerance = 4 * 1.2e-7 * (shape.H**0.5 + count**0.5 + 2) + 2 * 2**-7
    actual = bits.view(jnp.bfloat16).astype(np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_alone_and_among_others(name):
    shape = SHAPES[name]
    given = _given(shape, WIDE if shape.wide else NARROW)
    for count in [*COUNTS, *(LONG if shape.wide else [])]:
        tables = [Z for Z in ((NARROW, 40, WIDE) if shape.wide else (NARROW,)) if count <= Z * pages.PAGE]
        expected = _attended(shape, given, count, 1, tables[0])
        _check(shape, given, count, expected)
        for Z in tables:
            for rows in shape.rows if Z != 40 else (1, 32):
                actual = _attended(shape, given, count, rows, Z)
                np.testing.assert_array_equal(actual, expected, err_msg=f"count {count}, {rows} rows, {Z} pages")


SETTINGS = [
    {"splits": splits, "blocks": blocks, "warps": warps}
    for splits, blocks, warps in [
        (1, 1, 4),
        (1, 1, 8),
        (1, 2, 4),
        (1, 4, 8),
        (1, 8, 4),
        (1, 8, 8),
        (3, 2, 8),
        (16, 1, 4),
    ]
]


@pytest.mark.parametrize("name", ["gpt-oss", "gpt2", "llama"])
def test_settings_change_no_bit(name):
    shape = SHAPES[name]
    given = _given(shape, NARROW)
    for count in (33, 600, 2049):
        expected = _attended(shape, given, count, 1, NARROW)
        for settings in SETTINGS:
            actual = _attended(shape, given, count, 2, NARROW, settings)
            np.testing.assert_array_equal(actual, expected, err_msg=f"count {count}, {settings}")
