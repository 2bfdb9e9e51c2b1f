"""GPT-2's block for one token a row over a cache, in float64 NumPy; and random operands of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block import LinearWeights, NormWeights, Stream, Weights

EPSILON, SCALE = 1e-5, 0.125


class Operands(NamedTuple):
    """What `pallas_kernels.block.block` takes, with each row's keys and values together instead of in pages."""

    stream: Stream
    weights: Weights
    positions_T: jax.Array
    k_TNSH: jax.Array
    v_TNSH: jax.Array


def operands(N: int, T: int, S: int, dtype: Any) -> Operands:
    """Of N heads, T rows and S places: full, empty and inactive rows. Places that nobody may look at hold NaN."""
    rng = np.random.default_rng(1000 * N + T)
    D, F = 64 * N, 256 * N

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)

    def norm() -> NormWeights:
        return NormWeights(normal(D), normal(D, scale=0.1))

    def linear(inputs: int, outputs: int) -> LinearWeights:
        return LinearWeights(normal(inputs, outputs, scale=inputs**-0.5), normal(outputs, scale=0.1))

    x_TD = normal(T, D, scale=2.0)
    x_TD = x_TD.at[:, 0].add(300)  # as large as some columns of trained models are
    weights = Weights(norm(), linear(D, 3 * D), linear(D, D), norm(), linear(D, F), linear(F, D))
    positions_T = np.array([S // 2, S - 1, -1, 0, 5, 1, S // 3, S // 5][:T], np.int32)
    k_TNSH, v_TNSH = (np.array(normal(T, N, S, 64).astype(jnp.float32)) for _ in range(2))
    for row, position in enumerate(positions_T):
        k_TNSH[row, :, max(position, 0) :] = v_TNSH[row, :, max(position, 0) :] = np.nan
    caches = (jnp.asarray(each).astype(dtype) for each in (k_TNSH, v_TNSH))
    return Operands(Stream.of(x_TD, F), weights, jnp.asarray(positions_T), *caches)


def block(given: Operands, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, and the keys and values of the new tokens [T, N, H]; rounded to the dtype where `api.block` says so."""
    weights = given.weights

    def rounded(x: np.ndarray) -> np.ndarray:
        return _wide(jnp.asarray(x, jnp.float32).astype(dtype)) if dtype != jnp.float32 else x

    def product(x: np.ndarray, linear: LinearWeights) -> np.ndarray:
        return x @ _wide(linear.kernel) + _wide(linear.bias)

    def normed(x: np.ndarray, norm: NormWeights) -> np.ndarray:
        centered = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centered).mean(axis=-1, keepdims=True) + EPSILON)
        return rounded(centered / deviation * _wide(norm.scale_D) + _wide(norm.bias_D))

    x = _wide(given.stream.x_TD)
    T, N = given.k_TNSH.shape[:2]
    qkv = rounded(product(normed(x, weights.attention_norm), weights.qkv))
    q, k, v = (part.reshape(T, N, 64) for part in np.split(qkv, 3, axis=1))
    heads = np.zeros((T, N, 64))
    for row, position in enumerate(np.asarray(given.positions_T)):
        if position < 0:
            continue
        keys, values = (
            np.concatenate((_wide(cache)[row, :, :position], new[row][:, None]), axis=1)
            for cache, new in ((given.k_TNSH, k), (given.v_TNSH, v))
        )
        scores = np.einsum("nh,nsh->ns", q[row], keys) * SCALE
        weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads[row] = np.einsum("ns,nsh->nh", weight / weight.sum(axis=-1, keepdims=True), values)
    x = rounded(x + product(rounded(heads.reshape(T, -1)), weights.out))
    hidden = rounded(product(normed(x, weights.mlp_norm), weights.up))
    hidden = rounded(hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))))
    return rounded(x + product(hidden, weights.down)), k, v


def _wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)
