"""The cache against lists of keys and values: pages used in turns, windows, rows that go on from others."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.layers.cache import PAGE, KVCache, pages_of, tail_pages
from pallas_kernels.fp8_pages import Fp8Pages
from pallas_kernels.pages import Tiles
from tests.oracles import attention_numpy, fp8_numpy

WINDOWS = (None, 130, 9, None)
K, N, H, ROWS, CHUNK, LENGTH = 2, 4, 16, 3, 150, 900
SCALE = 0.3


def _cache(chunk: int | None = CHUNK, fill: float = np.nan, **changes) -> KVCache:
    shape = {"windows": WINDOWS, "batch": ROWS, "max_length": LENGTH, "num_kv_heads": K, "head_width": H} | changes
    cache = KVCache.create(**{"dtype": jnp.float32, "chunk": chunk} | shape)

    def filled(x: jax.Array) -> jax.Array:
        return jnp.full_like(x, 0xFF if x.dtype == jnp.uint8 else fill)  # of float8, NaN times an infinite scale

    return dataclasses.replace(cache, **{kv: jax.tree.map(filled, getattr(cache, kv)) for kv in "kv"})


@partial(jax.jit, donate_argnums=0)
def _call(cache: KVCache, rows_B, positions_BT, q_LBTNH, k_LBTKH, v_LBTKH):
    """Adds keys and values of all layers to some rows, and attends to them."""
    called, found = cache.rows(rows_B), []
    for layer in range(len(cache.k)):
        written = called.layer(layer).update(k_LBTKH[layer], v_LBTKH[layer], positions_BT)
        found.append(written.attend(q_LBTNH[layer], positions_BT, None, scale=SCALE, implementation="xla"))
        called = called.with_layer(layer, written)
    return jnp.stack(found), cache.joined(rows_B, called.extended(positions_BT))


class Rows:
    """A cache, and what it should hold."""

    def __init__(self, cache: KVCache, seed: int = 0):
        self.cache = cache
        self.as_read = fp8_numpy.as_read if isinstance(cache.k[0], Fp8Pages) else np.asarray
        self.rng = np.random.default_rng(seed)
        self.held = [[] for _ in range(ROWS)]  # (k, v), each [L, K, H], of each position

    def call(self, counts: dict[int, int], T: int, size: int = ROWS) -> dict[int, np.ndarray]:
        """The rows get so many tokens, of which the results are checked and returned."""
        rows_B = np.full(size, -1, np.int32)
        positions_BT = np.full((size, T), -1, np.int32)
        made = [self.rng.standard_normal((len(WINDOWS), size, T, heads, H)) for heads in (N, K, K)]
        q_LBTNH, k_LBTKH, v_LBTKH = (x.astype(np.float32) for x in made)
        for b, (row, count) in enumerate(counts.items()):
            rows_B[b] = row
            positions_BT[b, :count] = len(self.held[row]) + np.arange(count)
            self.held[row] += [tuple(self.as_read(x[:, b, t]) for x in (k_LBTKH, v_LBTKH)) for t in range(count)]
        out_LBTNH, self.cache = _call(self.cache, rows_B, positions_BT, q_LBTNH, k_LBTKH, v_LBTKH)
        assert self.cache.lengths_B.tolist() == [len(held) for held in self.held]
        results = {}
        for b, (row, count) in enumerate(counts.items()):
            results[row] = np.asarray(out_LBTNH[:, b, :count])
            for layer, window in enumerate(WINDOWS):
                some = sorted({0, count // 2, count - 1})  # of the queries, since the oracle is slow
                k_SKH, v_SKH = (np.stack([each[kv][layer] for each in self.held[row]]) for kv in (0, 1))
                expected = attention_numpy.attention(
                    q_LBTNH[layer][b : b + 1, some],
                    k_SKH.transpose(1, 0, 2)[None],
                    v_SKH.transpose(1, 0, 2)[None],
                    positions_BT[b : b + 1, some],
                    np.arange(len(k_SKH))[None],
                    None,
                    scale=SCALE,
                    window=window,
                )
                np.testing.assert_allclose(results[row][layer, some], expected[0], rtol=0, atol=2e-5)
        assert not out_LBTNH[:, len(counts) :].any()
        return results


@pytest.mark.parametrize(
    ("chunk", "dtype"),
    [(CHUNK, "float32"), (None, "float32"), (CHUNK, "fp8")],
    ids=["pages taken in turns", "pages for all", "in float8"],
)
def test_rows_of_any_lengths_see_what_a_list_would_hold(chunk, dtype):
    rows = Rows(_cache(chunk, dtype=dtype))
    rng = np.random.default_rng(1)
    while any(len(held) < LENGTH - CHUNK for held in rows.held):
        some = rng.permutation(ROWS)[: rng.integers(1, ROWS + 1)].tolist()
        some = [row for row in some if len(rows.held[row]) < LENGTH - CHUNK]
        if rng.random() < 0.5:
            rows.call({row: int(rng.choice([1, 17, 100, CHUNK - 1, CHUNK])) for row in some}, CHUNK)
        else:
            rows.call(dict.fromkeys(some, 1), 1)


def test_the_last_position_of_a_page_and_the_first_of_the_next():
    rows = Rows(_cache())
    rows.call({0: PAGE - 2, 1: PAGE - 1, 2: CHUNK}, CHUNK)
    for _ in range(4):
        rows.call({0: 1, 1: 1}, 1)
    rows.call({2: 2 * PAGE - CHUNK, 1: 1}, CHUNK)
    rows.call({2: 1, 0: 1}, 1)


def test_a_call_of_a_few_rows_leaves_the_others_as_they_are():
    rows = Rows(_cache())
    rows.call({0: 50, 1: 60, 2: 70}, CHUNK)
    before = jax.tree.map(np.array, rows.cache)
    rows.call({1: 1}, 1, size=2)
    rows.call({1: 5}, CHUNK, size=1)
    for layer in range(len(WINDOWS)):
        for row in (0, 2):
            own = before.table(layer)[row]
            np.testing.assert_array_equal(rows.cache.k[layer][own], before.k[layer][own])
            np.testing.assert_array_equal(rows.cache.v[layer][own], before.v[layer][own])
    jax.tree.map(np.testing.assert_array_equal, rows.cache.tables, before.tables)


@pytest.mark.parametrize("window", [None, 1, 2, 9, 128, 129, 130, 300])
@pytest.mark.parametrize("chunk", [1, 2, 128, 130, 512])
def test_pages_are_as_many_as_a_call_touches_and_no_more(window, chunk):
    blocks = 8
    count = pages_of(window, max_length=blocks * PAGE - 5, chunk=chunk)
    if window is None:
        assert count == blocks
        return
    touched = []
    for first in range(PAGE, 2 * PAGE):  # of the call's tokens, when the window reaches back to a position
        last = first + chunk - 1
        touched.append(last // PAGE - (first - window + 1) // PAGE + 1)
    assert count == min(max(touched), blocks)
    assert tail_pages(window) == max((n - 1) // PAGE - (n - max(window - 1, 1)) // PAGE + 1 for n in range(400, 600))


def test_each_row_has_pages_of_its_own_and_none_has_page_0():
    cache = _cache()
    assert [x.shape for x in cache.k] == [x.shape for x in cache.v]
    assert len(cache.tables) == 3
    assert cache.capacity == 8 * PAGE
    for layer, window in enumerate(WINDOWS):
        table_BZ = np.asarray(cache.table(layer))
        own = [set(table_Z.tolist()) for table_Z in table_BZ]
        assert {len(pages) for pages in own} == {pages_of(window, max_length=LENGTH, chunk=CHUNK)}
        assert set.union(*own) == set(range(1, len(cache.k[layer])))
        assert sum(map(len, own)) == len(cache.k[layer]) - 1


def test_layers_see_all_where_their_window_is_no_shorter_than_a_row():
    cache = _cache(windows=(None, 256, 255), max_length=200)
    assert cache.windows == (None, None, 255)
    assert [len(x) for x in cache.k] == [1 + ROWS * 2] * 3


def test_more_tokens_than_the_cache_was_created_for_are_refused():
    cache, new_BTKH = _cache(), jnp.zeros((ROWS, CHUNK + 1, K, H))
    with pytest.raises(ValueError, match=r"a call of 151 tokens a row, .* at most 150: create it with a larger chunk"):
        cache.layer(0).update(new_BTKH, new_BTKH, jnp.zeros((ROWS, CHUNK + 1), jnp.int32))


def test_padding_may_lie_between_tokens():
    positions_BT = np.full((ROWS, 40), -1, np.int32)
    rng = np.random.default_rng(3)
    for b, count in enumerate((40, 23, 1)):
        positions_BT[b, np.sort(rng.permutation(40)[:count])] = np.arange(count)
    made = [rng.standard_normal((1, ROWS, 40, heads, H)).astype(np.float32) for heads in (N, K, K)]
    out_LBTNH, cache = _call(_cache(windows=(9,)), np.arange(ROWS, dtype=np.int32), positions_BT, *made)
    (q_BTNH,), (k_BTKH,), (v_BTKH,) = made
    swapped = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    expected = attention_numpy.attention(q_BTNH, *swapped, positions_BT, positions_BT, scale=SCALE, window=9)
    np.testing.assert_allclose(out_LBTNH[0], np.where(positions_BT[..., None, None] < 0, 0, expected), atol=2e-5)
    assert cache.lengths_B.tolist() == [40, 23, 1]


def test_a_call_may_have_tokens_of_several_rows_one_after_another():
    """The bits are those of a call for each, also for a row's tokens in two tiles."""
    rng = np.random.default_rng(4)
    counts, T = (130, 3, 0), 160
    made = [rng.standard_normal((len(WINDOWS), 1, T, heads, H)).astype(np.float32) for heads in (N, K, K)]
    start = [Rows(_cache()) for _ in range(2)]
    for rows in start:
        rows.call({0: 100, 1: PAGE, 2: 7}, CHUNK)
    tiles = Tiles(
        *(jnp.asarray(x, jnp.int32) for x in ([0, 0, 1, 0], [0, 128, 130, 0], [128, 2, 3, 0], [100, 228, 128, 0]))
    )
    positions_1T = jnp.asarray([[*range(100, 230), *range(128, 131), *[-1] * 27]], jnp.int32)

    @jax.jit
    def packed(cache: KVCache):
        cache, found = dataclasses.replace(cache, tiles=tiles), []
        for layer in range(len(WINDOWS)):
            q_1TNH, k_1TKH, v_1TKH = (x[layer] for x in made)
            written = cache.layer(layer).update(k_1TKH, v_1TKH, positions_1T)
            found.append(written.attend(q_1TNH, positions_1T, None, scale=SCALE, implementation="xla"))
            cache = cache.with_layer(layer, written)
        return jnp.stack(found), cache.extended(positions_1T)

    out_L1TNH, cache = packed(dataclasses.replace(start[0].cache, chunk=T))
    assert cache.lengths_B.tolist() == [230, 131, 7]
    assert not out_L1TNH[:, :, sum(counts) :].any()
    first = 0
    for row, count in enumerate(counts[:2]):
        positions_BT = np.full((1, CHUNK), -1, np.int32)
        positions_BT[0, :count] = positions_1T[0, first : first + count]
        own = [
            np.pad(x[:, :, first : first + count], ((0, 0), (0, 0), (0, CHUNK - count), (0, 0), (0, 0))) for x in made
        ]
        out_LBTNH, start[1].cache = _call(start[1].cache, np.asarray([row], np.int32), positions_BT, *own)
        np.testing.assert_array_equal(out_L1TNH[:, 0, first : first + count], out_LBTNH[:, 0, :count])
        first += count
    for layer in range(len(WINDOWS)):
        np.testing.assert_array_equal(cache.k[layer], start[1].cache.k[layer])
        np.testing.assert_array_equal(cache.v[layer], start[1].cache.v[layer])
