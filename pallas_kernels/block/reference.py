"""GPT-2's block in jnp, which XLA compiles: composed of other operations' references."""

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm.reference import add_norm
from pallas_kernels.append import write_rows
from pallas_kernels.attention import paged
from pallas_kernels.block.stream import LinearWeights, NormWeights, Stream, Weights, moments
from pallas_kernels.fp8_pages import Pages


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
) -> tuple[Stream, Pages, Pages]:
    """See `api.block`. The workspaces stay as they are."""
    T, (N, _, H) = len(positions_T), k_YNSH.shape[1:]

    def normed(x_TD: jax.Array, norm: NormWeights) -> jax.Array:
        return add_norm(x_TD, None, *norm, epsilon=epsilon, center=True)[1]

    x_TD = stream.x_TD
    qkv_TRH = _product(normed(x_TD, weights.attention_norm), weights.qkv).astype(x_TD.dtype).reshape(T, 3 * N, H)
    q_TNH, *new = jnp.split(qkv_TRH, 3, axis=1)
    k_YNSH, v_YNSH = (
        write_rows(old, each, table_TZ, positions_T) for old, each in zip((k_YNSH, v_YNSH), new, strict=True)
    )
    heads_T1NH = paged.rows(q_TNH[:, None], k_YNSH, v_YNSH, table_TZ, positions_T[:, None], scale=scale)
    x_TD = _added(x_TD, _product(heads_T1NH.reshape(T, N * H), weights.out))
    hidden_TF = _product(normed(x_TD, weights.mlp_norm), weights.up).astype(x_TD.dtype)
    hidden_TF = jax.nn.gelu(hidden_TF.astype(jnp.float32), approximate=True).astype(x_TD.dtype)
    x_TD = _added(x_TD, _product(hidden_TF, weights.down))
    return Stream(x_TD, moments(x_TD), stream.cleared_W, stream.used_W), k_YNSH, v_YNSH


def _product(x_TI: jax.Array, linear: LinearWeights) -> jax.Array:
    return jnp.dot(x_TI, linear.kernel, preferred_element_type=jnp.float32) + linear.bias.astype(jnp.float32)


def _added(x_TD: jax.Array, y_TD: jax.Array) -> jax.Array:
    return (x_TD.astype(jnp.float32) + y_TD).astype(x_TD.dtype)
