"""Weights of several dtypes, and ways to save and compare them."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from gptjax.checkpoints import saving, weights
from gptjax.checkpoints.manifest import Manifest
from tests.convert import made

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
LEAVES = {
    ("block_0", "mlp", "kernel"): RNG.standard_normal((6, 4), np.float32),
    ("block_0", "mlp", "bias"): RNG.standard_normal((4,), np.float32).astype(np.float16),
    ("block_1", "packed"): RNG.integers(0, 256, (8, 3), np.uint8),
    ("embedding",): RNG.standard_normal((10, 6), np.float32).astype(ml_dtypes.bfloat16),
    ("zeros",): np.zeros((5,), np.float32),
}


def targets_of(**dtypes):
    """What LEAVES are, with other dtypes for some, named by the path's last part."""
    return weights.nest(
        {path: jax.ShapeDtypeStruct(array.shape, dtypes.get(path[-1], array.dtype)) for path, array in LEAVES.items()}
    )


def save(destination: Path, leaves=LEAVES, *, fail=None, **options) -> Manifest:
    """Saves leaves; `fail` is called with the number of each before it is read."""
    parts = [part(path, array, number, fail) for number, (path, array) in enumerate(leaves.items())]
    return saving.save(destination, parts, source=saving.Source("test", tuple), **options)


def part(path, array, number: int = 0, fail=None) -> saving.Part:
    def read():
        if fail is not None:
            fail(number)
        return {path: array}

    return saving.Part({path: jax.ShapeDtypeStruct(array.shape, array.dtype)}, read)


def assert_equal(params, leaves=LEAVES):
    found = weights.flatten(params)
    assert found.keys() == leaves.keys()
    for path, array in leaves.items():
        assert isinstance(found[path], jax.Array)
        assert made.same_bits(np.asarray(found[path]), array)
