"""Appending to the cache with norms of heads, emulated on a CPU, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.append import mosaic_sm90
from pallas_kernels.append.mosaic_sm90 import THREADS
from pallas_kernels.pages import PAGE
from pallas_kernels.ptx.rows import shared_floats
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic

pytestmark = needs_mosaic
EPSILON, ROUNDING = 1e-5, float(jnp.finfo(jnp.bfloat16).eps) / 2


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("H", "K"), [(64, 1), (64, 2), (128, 1), (256, 1)])
def test_heads_are_normed_and_rotated_and_written(H, K, normed):
    """With K = 1 and H = 64, the last block's last warps have no head."""
    rng, B, N, splits = np.random.default_rng(H), 3, 3, 2
    parts = rng.standard_normal((splits, B, (N + 2 * K) * H)).astype(np.float32)
    q_scale, k_scale = (jnp.asarray(rng.standard_normal(H), jnp.bfloat16) for _ in "qk")
    angle = rng.uniform(-3, 3, (B, H // 2)).astype(np.float32)
    slots = np.asarray([PAGE + 3, -1, 2 * PAGE - 1], np.int32)
    dtype = jnp.dtype(jnp.bfloat16) if normed else None
    plan = mosaic_sm90._AppendPlan(B, splits, N, K, H, False, True, dtype, EPSILON)
    operands = {"parts": parts, "bias": slots, "cos": np.cos(angle), "sin": np.sin(angle), "slots": slots}
    operands |= {"q_scale": q_scale, "k_scale": k_scale}
    pool = jax.ShapeDtypeStruct((2, K, PAGE, H), jnp.bfloat16)
    found = launched(mosaic_sm90)(
        partial(mosaic_sm90.append_to_cache, plan),
        operands,
        {"q": jax.ShapeDtypeStruct((B, N, H), jnp.bfloat16), "k": pool, "v": pool},
        {"row": B, "part": -(-plan.heads * plan.half // THREADS)},
        {"sums": shared_floats(THREADS // 32)},
    )
    heads = _rounded(parts.sum(axis=0, dtype=np.float64)).reshape(B, N + 2 * K, H)
    turned = heads[:, : N + K]
    if normed:
        scales = np.repeat(np.asarray([q_scale, k_scale], np.float64), [N, K], axis=0)
        turned = _rounded(turned / np.sqrt(np.square(turned).mean(axis=-1, keepdims=True) + EPSILON) * scales)
    first, last = np.split(turned, 2, axis=-1)
    cos, sin = np.cos(angle, dtype=np.float64)[:, None], np.sin(angle, dtype=np.float64)[:, None]
    turned = np.concatenate((first * cos - last * sin, last * cos + first * sin), axis=-1)
    near = {
        "rtol": 2 * ROUNDING,
        "atol": 8 * ROUNDING,
    }  # a number just between two of bfloat16 may be rounded to either
    np.testing.assert_allclose(np.asarray(found["q"], np.float64), turned[:, :N], **near)
    for row, place in ((0, 3), (2, PAGE - 1)):
        np.testing.assert_allclose(np.asarray(found["k"][1, :, place], np.float64), turned[row, N:], **near)
        np.testing.assert_array_equal(np.asarray(found["v"][1, :, place], np.float64), heads[row, N + K :])
    written = found["v"].view(np.uint16).reshape(2, K, PAGE, H) != 0xFFFF
    assert written.any(axis=-1).sum() == 2 * K
