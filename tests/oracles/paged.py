"""Pools of pages in NumPy: rows' keys and values scattered over pages in any order, with NaN wherever nobody looks."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

PAGE = 128


class Paged(NamedTuple):
    """A pool, and the same keys and values row by row."""

    k_YKSH: np.ndarray
    v_YKSH: np.ndarray
    table_BZ: np.ndarray
    k_BKSH: np.ndarray  # position p at place p
    v_BKSH: np.ndarray
    positions_BS: np.ndarray  # of the places of the latter; -1 for what nobody sees


def paged(
    spans: list[tuple[int, int]],
    *,
    K: int,
    H: int,
    dtype: Any,
    seed: int = 0,
    pages: int | None = None,
    shuffled: bool = True,
    spare: int = 3,
) -> Paged:
    """Rows that see positions first … end - 1 of `spans`; a row of (0, 0) sees nothing.

    Args:
      pages: of each row's table; by default what the longest needs.
      shuffled: give out pages in any order, else in ascending order.
      spare: pages that belong to nobody, besides page 0.
    """
    rng = np.random.default_rng(seed)
    B, Z = len(spans), max(-(-max(end for _, end in spans) // PAGE), 1) if pages is None else pages
    Y = 1 + B * Z + spare
    k_BKSH, v_BKSH = (np.array(jnp.asarray(rng.standard_normal((B, K, Z * PAGE, H), np.float32), dtype)) for _ in "kv")
    k_YKSH, v_YKSH = (np.full((Y, K, PAGE, H), np.nan, k_BKSH.dtype) for _ in "kv")
    free = 1 + (np.random.default_rng(seed + 1).permutation(Y - 1) if shuffled else np.arange(Y - 1))
    table_BZ, positions_BS = np.zeros((B, Z), np.int32), np.full((B, Z * PAGE), -1, np.int32)
    taken = iter(free.tolist())
    for row, (first, end) in enumerate(spans):
        positions_BS[row, first:end] = np.arange(first, end)
        k_BKSH[row, :, positions_BS[row] < 0] = v_BKSH[row, :, positions_BS[row] < 0] = np.nan
        for block in range(first // PAGE, -(-end // PAGE)):
            page = table_BZ[row, block] = next(taken)
            places = slice(block * PAGE, (block + 1) * PAGE)
            k_YKSH[page], v_YKSH[page] = k_BKSH[row, :, places], v_BKSH[row, :, places]
    return Paged(k_YKSH, v_YKSH, table_BZ, k_BKSH, v_BKSH, positions_BS)


def renumbered(given: Paged, seed: int) -> Paged:
    """The same rows in other pages."""
    Y = len(given.k_YKSH)
    order = np.concatenate(([0], 1 + np.random.default_rng(seed).permutation(Y - 1)))  # where each page goes
    k_YKSH, v_YKSH = np.empty_like(given.k_YKSH), np.empty_like(given.v_YKSH)
    k_YKSH[order], v_YKSH[order] = given.k_YKSH, given.v_YKSH
    return given._replace(k_YKSH=k_YKSH, v_YKSH=v_YKSH, table_BZ=order[given.table_BZ].astype(np.int32))


def in_pages(
    cache_BKSH: np.ndarray, positions_B: np.ndarray, seed: int, spare: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that have no more than `positions` written, in pages in any order: a pool and its table.

    There are pages for the position itself too. Everything else is NaN.
    """
    B, K, S, H = cache_BKSH.shape
    Z = -(-S // PAGE)
    cache_BKSH = np.pad(cache_BKSH, ((0, 0), (0, 0), (0, Z * PAGE - S), (0, 0)), constant_values=np.nan)
    pool_YKSH = np.full((1 + B * Z + spare, K, PAGE, H), np.nan, cache_BKSH.dtype)
    free = iter((1 + np.random.default_rng(seed).permutation(len(pool_YKSH) - 1)).tolist())
    table_BZ = np.zeros((B, Z), np.int32)
    for row, position in enumerate(positions_B):
        for block in range(position // PAGE + 1):
            page = table_BZ[row, block] = next(free)
            pool_YKSH[page] = cache_BKSH[row, :, block * PAGE : (block + 1) * PAGE]
    return pool_YKSH, table_BZ
