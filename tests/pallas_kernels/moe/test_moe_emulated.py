"""The experts' kernel for few tokens, emulated on a CPU: how many blocks share a sum changes no bit."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.formats import mxfp4_sm90
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import quantize
from pallas_kernels.moe import mosaic_sm90
from pallas_kernels.moe.routing import Groups
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic

pytestmark = needs_mosaic
E, INPUTS, OUTPUTS = 2, 384, 64


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The product, on a CPU."""
    monkeypatch.setattr(ptx, "launch", launched(mosaic_sm90, mxfp4_sm90))
    return mosaic_sm90.product.__wrapped__


def test_blocks_share_runs_without_a_change(product):
    rng = np.random.default_rng(0)
    weight = quantize(jnp.asarray(rng.standard_normal((E, OUTPUTS, INPUTS)), jnp.float32))
    fragments = MXFP4Fragments.of(weight)
    assert mosaic_sm90.runs_of(fragments) == 3
    x = jnp.asarray(rng.standard_normal((4, INPUTS)), jnp.bfloat16)
    groups = Groups(jnp.asarray([1, 0], jnp.int32), jnp.asarray([[2, 0, 3], [1, -1, -1]], jnp.int32))
    found = []
    for splits, unroll, eights in itertools.product([1, 3], [1, 2], [1, 2]):
        settings = {"runs": 3, "splits": splits, "unroll": unroll, "eights": eights}
        parts = product(x, groups, fragments, **settings)
        assert parts.shape == (splits, 2, 3, OUTPUTS)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        found.append(total)
    numbers, x = np.asarray(weight.dequantize(), np.float64), np.asarray(x, np.float64)
    for group, slot, token, expert in ((0, 0, 2, 1), (0, 1, 0, 1), (0, 2, 3, 1), (1, 0, 1, 0)):
        np.testing.assert_allclose(found[0][group, slot], numbers[expert] @ x[token], rtol=0, atol=1e-5)
        for other in found[1:]:
            np.testing.assert_array_equal(other[group, slot], found[0][group, slot])
