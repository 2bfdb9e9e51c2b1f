"""What is added to a residual, and its norm, in float64 NumPy; and random operands of these."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.partial_sum import PartialSum


class Case(NamedTuple):
    """What is added: S pieces of each of R rows, X of which a token adds; with what else."""

    T: int
    D: int
    S: int = 1
    X: int = 0  # 0: without rows_TX
    R: int = 11
    E: int = 0  # rows of bias; 0: none
    weighted: bool = False


def operands(case: Case, dtype: Any) -> tuple[jax.Array, PartialSum, jax.Array, jax.Array]:
    """x, terms, scale and bias.

    Of token 0 the last term is empty, of the last token all are, and with several biases two terms of token 1 have
    none of these. The weight of an empty term is NaN.
    """
    rng = np.random.default_rng(case.T + case.D)
    T, D, S, X, R, E, weighted = case
    rows, weights, bias, bias_rows = None, None, None, None
    if X:
        rows = rng.integers(0, R, (T, X)).astype(np.int32)
        rows[0, -1] = -1
        rows[-1, T > 1 :] = -5
    if E and X:
        bias_rows = rng.integers(0, E, (T, X)).astype(np.int32)
        bias_rows[1:2, 0], bias_rows[1:2, -1] = -1, E
    if weighted:
        weights = rng.random((T, X), np.float32)
        weights[~_counts(rows, bias_rows, E)] = np.nan
    if E:
        bias = jnp.asarray(rng.standard_normal((E, D)), dtype)
    parts = rng.standard_normal((S, R if X else T, D)).astype(np.float32)
    x, scale, norm_bias = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((T, D), D, D))
    return x, PartialSum(*jax.tree.map(jnp.asarray, (parts, rows, weights, bias, bias_rows))), scale, norm_bias


def _counts(rows_TX: np.ndarray, bias_rows_TX: np.ndarray | None, num_biases: int) -> np.ndarray:
    if bias_rows_TX is None:
        return rows_TX >= 0
    return (rows_TX >= 0) & (bias_rows_TX >= 0) & (bias_rows_TX < num_biases)


def total(terms: PartialSum) -> np.ndarray:
    """`terms.total()`."""
    parts = np.asarray(terms.parts_JAO, np.float64)
    T = parts.shape[1] if terms.rows_TX is None else terms.rows_TX.shape[0]
    bias = np.zeros((1, parts.shape[2])) if terms.bias_EO is None else np.asarray(terms.bias_EO, np.float64)
    out = np.zeros((T, parts.shape[2]))
    for t in range(T):
        for x in range(terms.num_terms):
            row = t if terms.rows_TX is None else int(terms.rows_TX[t, x])
            e = 0 if terms.bias_rows_TX is None else int(terms.bias_rows_TX[t, x])
            if row >= 0 and 0 <= e < len(bias):
                weight = 1.0 if terms.weights_TX is None else float(terms.weights_TX[t, x])
                out[t] += (parts[:, row].sum(axis=0) + bias[e]) * weight
    return out


def norm(sum_TD: Any, scale_D: Any, bias_D: Any, *, epsilon: float, center: bool) -> np.ndarray:
    """LayerNorm where `center`, else RMSNorm."""
    y = np.asarray(sum_TD, np.float64)
    if center:
        y = y - y.mean(axis=-1, keepdims=True)
    y = y / np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + epsilon) * np.asarray(scale_D, np.float64)
    return y if bias_D is None else y + np.asarray(bias_D, np.float64)
