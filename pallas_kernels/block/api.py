"""GPT-2's block in one kernel, for one token of each of a few rows, where launching kernels is what costs time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block import reference
from pallas_kernels.block.stream import PANEL, Stream, Weights, Workspace
from pallas_kernels.fp8_pages import Pages

MOST_ROWS = 8
_MOST_PANELS = 32  # whose moments one warp can merge
MOST_PAGES = 32  # of a row, whose numbers one warp holds
# F / D, the same in all sizes of GPT-2: each of a cluster's first blocks has one panel of hidden units.
_HIDDEN = 4
_GROUPS = 8  # of multiprocessors, at most: a cluster lies within one group


def takes(
    x_BTD: jax.Array,
    weights: Weights,
    k_YNSH: Pages,
    v_YNSH: Pages,
    *,
    activation: str,
    implementation: str = dispatch.AUTO,
) -> bool:
    """Whether there is a kernel for such a block here: on Hopper, in bfloat16, with the proportions of GPT-2.

    Args:
      x_BTD: the residual stream: one token (T = 1) of up to `MOST_ROWS` rows.
      weights: the block's, all of x's dtype; none may be packed.
      k_YNSH, v_YNSH: its cache. H is 64, and N is D / 64, up to 32 and to what `cluster` has room for.
      activation: the MLP's: the kernel has only "gelu_tanh".
    """
    one_token = x_BTD.shape[1] == 1
    return one_token and activation == "gelu_tanh" and _has_kernel(x_BTD, weights, k_YNSH, v_YNSH, implementation)


def _has_kernel(x: jax.Array, weights: Weights, k_YNSH: Pages, v_YNSH: Pages, implementation: str) -> bool:
    """Whether the kernel runs here for these operands, x [..., D] with one row per token."""
    *rows, D = x.shape
    N, _, H = k_YNSH.shape[1:]
    F = _HIDDEN * D
    shapes = [(D,), (D,), (D, 3 * D), (3 * D,), (D, D), (D,), (D,), (D,), (D, F), (F,), (F, D), (D,)]
    arrays = jax.tree.leaves(weights)
    return (
        dispatch.wanted(implementation) == dispatch.MOSAIC
        and all(each.dtype == jnp.bfloat16 for each in (x, k_YNSH, v_YNSH, *arrays))
        and [each.shape for each in arrays] == shapes
        and math.prod(rows) <= MOST_ROWS
        and (D, H) == (PANEL * N, PANEL)
        and N <= _MOST_PANELS
        and cluster(N) is not None
    )


def cluster(panels: int) -> int | None:
    """How many blocks share a product's inner axis, given the panels of a row; None if they do not fit on the device.

    All clusters wait for each other, so all must be on the device at once, one block per multiprocessor, and no other
    such kernel with them. (In a stream, each kernel waits for the one before it.) Multiprocessors of a group that are
    too few for another whole cluster may stay empty.
    """
    room = [each for each in range(_HIDDEN, 9) if panels * each <= multiprocessors() - _GROUPS * (each - 1)]
    return min(room, key=lambda each: (-(-panels // each), each), default=None)


def multiprocessors() -> int:
    """The device's number of multiprocessors; an H200's if there is no GPU, as when kernels are only lowered."""
    return getattr(jax.local_devices()[0], "core_count", None) or 132


def block(
    stream: Stream,
    weights: Weights,
    positions_T: jax.Array,
    k_YNSH: Pages,
    v_YNSH: Pages,
    table_TZ: jax.Array,
    *,
    epsilon: float,
    scale: float,
    implementation: str = dispatch.AUTO,
) -> tuple[Stream, Pages, Pages]:
    """GPT-2's block over a cache in pages, to which the rows' new keys and values are added.

    Means, with LayerNorm and the tanh form of GELU, with brackets for rounding to bfloat16 and all else in float32, and
    with `cache[t]` for what lies in row t's pages (see `pallas_kernels.pages`):

        q, k, v        = heads of [[attention_norm(x)] · qkv.kernel + qkv.bias]
        cache[t, n, p] = k, v at p = positions[t], if that is not negative
        y              = softmax(q · cached k · scale) · cached v, over positions 0 … p; 0 for a negative p
        x              = [x + [y] · out.kernel + out.bias]
        x              = [x + [gelu([[mlp_norm(x)] · up.kernel + up.bias])] · down.kernel + down.bias]

    Args:
      stream: one row per token.
      weights: of x's dtype.
      positions_T: int32, less than Z · S.
      k_YNSH, v_YNSH: of x's dtype. Updated in place if donated. Only places before a row's position have any influence;
        others may hold NaN.
      table_TZ: int32, each row's pages. The kernel takes up to 32; GPT-2 has 8.
      epsilon: of the norms.
      scale: scores are multiplied by it.
      implementation: "auto", "mosaic" (if `takes` is true) or "xla".

    Returns:
      The stream and the cache. A row's bits depend neither on the other rows nor on T, by "mosaic".

    Raises:
      ValueError: an unknown implementation, or one that does not support these operands; or a stream for other sizes.
    """
    T, D = stream.x_TD.shape
    words = Workspace(T, D, weights.up.bias.shape[0]).words
    if stream.cleared_W.shape != (words,):
        raise ValueError(f"a workspace of {words} words is needed, found {stream.cleared_W.shape}: use Stream.of(x, F)")
    available: dict[str, Callable[..., Any]] = {dispatch.XLA: reference.block}
    if table_TZ.shape[1] <= MOST_PAGES and _has_kernel(stream.x_TD, weights, k_YNSH, v_YNSH, implementation):
        from pallas_kernels.block import mosaic_sm90

        available[dispatch.MOSAIC] = partial(mosaic_sm90.block, blocks=cluster(k_YNSH.shape[1]))
    run = dispatch.choose("block", implementation, available)
    return run(stream, weights, positions_T, k_YNSH, v_YNSH, table_TZ, epsilon=epsilon, scale=scale)
