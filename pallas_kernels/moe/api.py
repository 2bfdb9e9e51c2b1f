"""A mixture of experts: each token goes through a few of many feed-forward networks."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.formats.fragments import MXFP4Fragments, fits
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.moe import reference
from pallas_kernels.moe.routing import BY_EXPERT
from pallas_kernels.partial_sum import PartialSum

_MANY = 16  # tokens of an expert, on average, from which on the Hopper kernel for many tokens is faster
_FEW = 512  # tokens up to which "auto" takes the Triton kernel; it was not measured with more


def moe(
    x_TD: jax.Array,
    experts_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: jax.Array | MXFP4 | MXFP4Fragments,
    gate_up_bias_E2F: jax.Array,
    down: jax.Array | MXFP4 | MXFP4Fragments,
    down_bias_ED: jax.Array,
    *,
    alpha: float,
    limit: float,
    width_over: tuple[str, ...] = (),
    implementation: str = dispatch.AUTO,
) -> PartialSum:
    """The weighted sum of the chosen experts' clamped SwiGLU networks.

    Means, for token t, with e = experts[t, x]:

        h       = gate_up[e] · x[t] + gate_up_bias[e]
        gate    = minimum(h[0::2], limit)
        up      = clip(h[1::2], -limit, limit)
        y[t, x] = down[e] · (gate * sigmoid(alpha * gate) * (up + 1)) + down_bias[e]
        out[t]  = Σ_x weights[t, x] * y[t, x]

    Args:
      x_TD: one row per token. The products' operands are rounded to its dtype; they accumulate in float32.
      experts_TX: int32 numbers of the chosen experts. One that does not exist, such as E or -1, adds nothing and costs
        little, so it marks padding.
      weights_TX: float32.
      gate_up: [E, D, 2F], gate and up interleaved; or packed, [E, 2F, D].
      down: [E, F, D]; or packed, [E, D, F].
      gate_up_bias_E2F, down_bias_ED: of any floating dtype.
      alpha, limit: of the activation.
      width_over: axes of the mesh whose devices have parts of F, under `shard_map`: the first of them adds down's bias.
      implementation: "auto", "mosaic" or "triton" (repacked weights and bfloat16), or "xla".

    Returns:
      [T, D] float32. Whoever reads it does the last sums. A token's bits do not depend on the others, for a given T;
      by "mosaic" not on T either, up to 128; on a CPU in float32, for any T.

    Raises:
      ValueError: an unknown implementation, or one that does not support these operands.
    """
    available: dict[str, Callable[..., PartialSum]] = {dispatch.XLA: reference.grouped}
    repacked = isinstance(gate_up, MXFP4Fragments) and isinstance(down, MXFP4Fragments)
    wanted = dispatch.wanted(implementation) if repacked and x_TD.dtype == jnp.bfloat16 else dispatch.XLA
    if wanted == dispatch.MOSAIC:
        from pallas_kernels.moe import grouped_sm90, mosaic_sm90

        few = x_TD.shape[0] <= BY_EXPERT and experts_TX.size < _MANY * gate_up.shape[0]
        available[dispatch.MOSAIC] = mosaic_sm90.routed if few else grouped_sm90.routed
    if wanted == dispatch.TRITON and (x_TD.shape[0] <= _FEW or implementation == dispatch.TRITON):
        from pallas_kernels.moe import triton

        available[dispatch.TRITON] = triton.routed
    run = dispatch.choose("moe", implementation, available)
    if width_over and run is reference.grouped:  # which adds it itself
        down_bias_ED = jnp.where(jax.lax.axis_index(width_over) == 0, down_bias_ED, 0)
    up = x_TD, experts_TX, weights_TX, gate_up, gate_up_bias_E2F
    terms = run(*up, down, down_bias_ED, alpha=alpha, limit=limit)
    return dataclasses.replace(terms, sharers=jax.lax.axis_size(width_over)) if width_over else terms


def repacked(weight: MXFP4, implementation: str = dispatch.AUTO) -> MXFP4 | MXFP4Fragments:
    """Experts' weights [E, O, I] in the layout that this device's kernels want.

    Other devices, which have no such kernel, get them unchanged, and so do weights that do not fit: see
    `formats.fragments.fits`.
    """
    pack = repacking(weight, weight.shape, implementation)
    return weight if pack is None else pack(weight)


def repacking(
    weight: MXFP4, shape: tuple[int, ...], implementation: str = dispatch.AUTO
) -> Callable[[MXFP4], MXFP4Fragments] | None:
    """What repacks parts of this shape of experts' weights, if this device's kernels want them so."""
    has_kernel = dispatch.wanted(implementation) in (dispatch.MOSAIC, dispatch.TRITON)
    return _repack if has_kernel and fits(weight, shape) else None


@jax.jit
def _repack(weight: MXFP4) -> MXFP4Fragments:
    """Repacks one expert at a time: the intermediate values are eight times as large."""
    return jax.lax.map(MXFP4Fragments.of, weight)
