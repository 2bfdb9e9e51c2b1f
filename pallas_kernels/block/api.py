"""GPT-2's block in one kernel: for one token of a few rows, where what costs is that kernels begin and end."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block import reference
from pallas_kernels.block.stream import PANEL, Stream, Weights, Workspace

MOST_ROWS = 8
_MOST_PANELS = 32  # whose moments a warp puts together
# Hidden units a column, as all sizes of GPT-2 have them: each of a cluster's first blocks has a panel of these.
_HIDDEN = 4
_GROUPS = 8  # of multiprocessors, at most: a cluster is all in one of them


def takes(
    x_BTD: jax.Array,
    weights: Weights,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    *,
    activation: str,
    implementation: str = dispatch.AUTO,
) -> bool:
    """Whether there is a kernel for such a block here: on Hopper, in bfloat16, with the sizes that all GPT-2 have.

    Args:
      x_BTD: the residual stream: one token (T = 1) of up to `MOST_ROWS` rows.
      weights: of the block, all of x's dtype; none may be packed.
      k_BNSH, v_BNSH: its cache. N is D / 64, up to 32 and as `cluster` has room, and H is 64.
      activation: of the MLP: "gelu_tanh" is the one that the kernel has.
    """
    one_token = x_BTD.shape[1] == 1
    return one_token and activation == "gelu_tanh" and _has_kernel(x_BTD, weights, k_BNSH, v_BNSH, implementation)


def _has_kernel(x: jax.Array, weights: Weights, k_TNSH: jax.Array, v_TNSH: jax.Array, implementation: str) -> bool:
    """Whether the kernel runs here for these operands, x [..., D] with a row a token."""
    *rows, D = x.shape
    _, N, _, H = k_TNSH.shape
    F = _HIDDEN * D
    shapes = [(D,), (D,), (D, 3 * D), (3 * D,), (D, D), (D,), (D,), (D,), (D, F), (F,), (F, D), (D,)]
    arrays = jax.tree.leaves(weights)
    return (
        dispatch.wanted(implementation) == dispatch.MOSAIC
        and all(each.dtype == jnp.bfloat16 for each in (x, k_TNSH, v_TNSH, *arrays))
        and [each.shape for each in arrays] == shapes
        and math.prod(rows) <= MOST_ROWS
        and (D, H) == (PANEL * N, PANEL)
        and N <= _MOST_PANELS
        and cluster(N) is not None
    )


def cluster(panels: int) -> int | None:
    """How many blocks share a product's inner axis, given the panels of a row; None if they do not fit on the device.

    All clusters wait for each other: so all must be on the device at once, a block to a multiprocessor, and no other
    such kernel with them. (In a stream of blocks, each waits for the one before.) Of the multiprocessors of a group,
    what whole clusters leave over may stay empty.
    """
    room = [each for each in range(_HIDDEN, 9) if panels * each <= multiprocessors() - _GROUPS * (each - 1)]
    return min(room, key=lambda each: (-(-panels // each), each), default=None)


def multiprocessors() -> int:
    """Of the device; an H200's where there is none, as when kernels are only lowered."""
    return getattr(jax.local_devices()[0], "core_count", None) or 132


def block(
    stream: Stream,
    weights: Weights,
    positions_T: jax.Array,
    k_TNSH: jax.Array,
    v_TNSH: jax.Array,
    *,
    epsilon: float,
    scale: float,
    implementation: str = dispatch.AUTO,
) -> tuple[Stream, jax.Array, jax.Array]:
    """GPT-2's block over a cache, to which the rows' new keys and values are added.

    Means, with LayerNorm, the tanh form of GELU, and what is rounded to bfloat16 in brackets; all else is float32:

        q, k, v        = heads of [[attention_norm(x)] · qkv.kernel + qkv.bias]
        cache[t, n, p] = k, v at p = positions[t], if that is not negative
        y              = softmax(q · cached k · scale) · cached v, over places 0 … p; 0 for a negative position
        x              = [x + [y] · out.kernel + out.bias]
        x              = [x + [gelu([[mlp_norm(x)] · up.kernel + up.bias])] · down.kernel + down.bias]

    Args:
      stream: one row a token.
      weights: of x's dtype.
      positions_T: int32, less than S.
      k_TNSH, v_TNSH: of x's dtype: position p of a row lies at place p. Updated in place where donated. What lies at
        other places than those before a row's position has no influence, not even NaN.
      epsilon: of the norms.
      scale: what scores are multiplied with.
      implementation: "auto", "mosaic" (what `takes` says yes to) or "xla".

    Returns:
      The stream and the cache. A row's bits do not depend on the other rows, for a given T.

    Raises:
      ValueError: an unknown implementation, or one that does not take these operands; or a stream for other sizes.
    """
    T, D = stream.x_TD.shape
    words = Workspace(T, D, weights.up.bias.shape[0]).words
    if stream.cleared_W.shape != (words,):
        raise ValueError(f"a workspace of {words} words is needed, found {stream.cleared_W.shape}: use Stream.of(x, F)")
    available: dict[str, Callable[..., Any]] = {dispatch.XLA: reference.block}
    if _has_kernel(stream.x_TD, weights, k_TNSH, v_TNSH, implementation):
        from pallas_kernels.block import mosaic_sm90

        available[dispatch.MOSAIC] = partial(mosaic_sm90.block, blocks=cluster(k_TNSH.shape[1]))
    run = dispatch.choose("block", implementation, available)
    return run(stream, weights, positions_T, k_TNSH, v_TNSH, epsilon=epsilon, scale=scale)
