"""How decode attention's tiles are dealt to splits, and how the splits' results are combined in jnp."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.decode import split


def test_splits_without_work_change_no_bit():
    """So that the Triton kernel's default number of splits, which a narrow table lowers, does not either."""
    rng = np.random.default_rng(0)
    out = rng.standard_normal((2, 3, 4, 2, 5)).astype(np.float32)
    lse, counts = rng.standard_normal((2, 3, 4, 2)).astype(np.float32), np.array([400, 130], np.int32)
    more_out = np.concatenate((out, np.full_like(out, np.nan)), axis=2)
    more_lse = np.concatenate((lse, np.full_like(lse, np.nan)), axis=2)
    combine = partial(split.combine, counts_B=counts, sinks_N=None, tile=128, dtype=np.float32)
    np.testing.assert_array_equal(combine(out, lse), combine(more_out, more_lse))


@pytest.mark.parametrize("splits", [1, 2, 7, 32])
def test_runs_deal_out_all_tiles_once(splits):
    for count in [0, 1, 127, 128, 129, 1000, 32768]:
        first, tiles = split.run(jnp.full(splits, count), jnp.arange(splits), tile=128, splits=splits)
        dealt = [tile for at, n in zip(first, tiles, strict=True) for tile in range(int(at), int(at + n))]
        assert dealt == list(range(-(-count // 128)))


def test_splits_by_default():
    assert split.choose(8, 32768, 128) == 32  # gpt-oss, one row: 256 programs
    assert split.choose(8, 2048, 128) == 16
    assert split.choose(8, 128, 128) == 1  # a window
    assert split.choose(256, 2048, 128) == 1
    assert split.choose(1000, 2048, 128) == 1
