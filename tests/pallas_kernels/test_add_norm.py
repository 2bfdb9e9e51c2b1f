"""`pallas_kernels.add_norm` and `Parts` against float64 NumPy. The kernel runs on a GPU only: here it is lowered."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm import add_norm
from pallas_kernels.parts import Parts

EPSILON = 1e-5
lowers = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic kernels are for JAX 0.11 and newer")


class Case(NamedTuple):
    """What is added: S pieces of each of R rows, X of which a token adds; with what else."""

    T: int
    D: int
    S: int = 1
    X: int = 0  # 0: without rows_TX
    R: int = 11
    E: int = 0  # rows of bias; 0: none
    weighted: bool = False


CASES = [
    Case(T=1, D=2880, S=3, X=4, E=32, weighted=True),
    Case(T=3, D=96, S=2, X=4, E=5, weighted=True),
    Case(T=7, D=96, S=3),
    Case(T=5, D=88, S=1, E=1),
    Case(T=2, D=64, S=4, X=3, weighted=True),
    Case(T=2, D=64, S=1, X=2, E=3),
]


def _operands(case: Case, dtype: Any) -> tuple[jax.Array, Parts, jax.Array, jax.Array]:
    """x, terms, scale and bias. Of token 0 the last term is empty, of the last token all are."""
    rng = np.random.default_rng(case.T + case.D)
    T, D, S, X, R, E, weighted = case
    rows, weights, bias, bias_rows = None, None, None, None
    if X:
        rows = rng.integers(0, R, (T, X)).astype(np.int32)
        rows[0, -1] = -1
        rows[-1, T > 1 :] = -5
    if weighted:
        weights = rng.random((T, X), np.float32)
        weights[rows < 0] = np.nan
    if E:
        bias = jnp.asarray(rng.standard_normal((E, D)), dtype)
    if E and X:
        bias_rows = np.where(rows < 0, -1, rng.integers(0, E, (T, X))).astype(np.int32)
    parts = rng.standard_normal((S, R if X else T, D)).astype(np.float32)
    x, scale, norm_bias = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((T, D), D, D))
    return x, Parts(*jax.tree.map(jnp.asarray, (parts, rows, weights, bias, bias_rows))), scale, norm_bias


def _total(terms: Parts) -> np.ndarray:
    parts = np.asarray(terms.parts_SRN, np.float64)
    T = parts.shape[1] if terms.rows_TX is None else terms.rows_TX.shape[0]
    out = np.zeros((T, parts.shape[2]))
    for t in range(T):
        for x in range(terms.num_terms):
            row = t if terms.rows_TX is None else int(terms.rows_TX[t, x])
            if row < 0:
                continue
            term = parts[:, row].sum(axis=0)
            if terms.bias_EN is not None:
                e = 0 if terms.bias_rows_TX is None else int(terms.bias_rows_TX[t, x])
                term = term + np.asarray(terms.bias_EN, np.float64)[e]
            out[t] += term * (1.0 if terms.weights_TX is None else float(terms.weights_TX[t, x]))
    return out


def _norm(sum_TD: np.ndarray, scale: Any, bias: Any, *, center: bool) -> np.ndarray:
    y = np.asarray(sum_TD, np.float64)
    if center:
        y = y - y.mean(axis=-1, keepdims=True)
    y = y / np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + EPSILON) * np.asarray(scale, np.float64)
    return y if bias is None else y + np.asarray(bias, np.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_are_summed(case):
    _, terms, *_ = _operands(case, jnp.float32)
    total = jax.jit(Parts.total)(terms)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, _total(terms), rtol=0, atol=1e-5)


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_numpy(case, dtype, center):
    x, terms, scale, bias = _operands(case, dtype)
    bias = bias if center else None
    run = jax.jit(partial(add_norm, epsilon=EPSILON, center=center, implementation="xla"))
    sum_TD, normed_TD = run(x, terms, scale, bias)
    assert sum_TD.dtype == normed_TD.dtype == dtype
    # What is added is rounded, and the sum: each to half a unit in the last place, and what float32's sums of a few
    # numbers add to that.
    rounding = float(jnp.finfo(dtype).eps) / 2 if dtype != jnp.float32 else 0.0
    total = _total(terms)
    expected = np.asarray(x, np.float64) + total
    allowed = rounding * (np.abs(expected) + (1 + rounding) * np.abs(total)) + 1e-5
    assert (np.abs(np.asarray(sum_TD, np.float64) - expected) <= allowed).all()
    # The norm is of the sum, which XLA may have rounded or not, and is rounded itself.
    expected = _norm(sum_TD, scale, bias, center=center)
    deviation = np.sqrt(np.square(np.asarray(sum_TD, np.float64)).mean(axis=-1, keepdims=True))
    if center:
        deviation = np.asarray(sum_TD, np.float64).std(axis=-1, keepdims=True)
    size = np.abs(np.asarray(sum_TD, np.float64))
    if center:  # the mean is off by as much as the mean of what numbers are off by
        size += size.mean(axis=-1, keepdims=True)
    of_sum = size / deviation * np.abs(np.asarray(scale, np.float64))
    allowed = rounding * (np.abs(expected) + (1 + rounding) * of_sum) + 2e-5
    assert (np.abs(np.asarray(normed_TD, np.float64) - expected) <= allowed).all()


def test_without_terms_the_sum_is_x():
    x, _, scale, _ = _operands(CASES[1], jnp.bfloat16)
    sum_TD, normed_TD = add_norm(x, None, scale, epsilon=EPSILON, center=False, implementation="xla")
    np.testing.assert_array_equal(sum_TD, x)
    expected = _norm(x, scale, None, center=False)
    np.testing.assert_allclose(np.asarray(normed_TD, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_empty_terms_and_their_weights_have_no_influence():
    x, terms, scale, _ = _operands(CASES[4], jnp.float32)
    assert np.isnan(terms.weights_TX).any()
    sum_TD, _ = add_norm(x, terms, scale, epsilon=EPSILON, center=False, implementation="xla")
    assert np.isfinite(sum_TD).all()
    np.testing.assert_allclose(sum_TD[-1], x[-1] + _total(terms)[-1], rtol=1e-6, atol=1e-6)


def _cuda(run: Any, *operands: Any) -> str:
    return jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@lowers
@pytest.mark.parametrize("T", [1, 3, 8, 32, 128])
@pytest.mark.parametrize(
    ("D", "S", "X", "center"),
    [(2880, 3, 4, False), (2880, 5, 0, False), (768, 2, 0, True), (1600, 4, 0, True), (2880, 0, 0, False)],
)
def test_the_kernel_lowers_for_cuda(T, D, S, X, center):
    from pallas_kernels.add_norm import mosaic

    case = Case(T=T, D=D, S=S, X=X, E=3, weighted=bool(X))
    x, terms, scale, bias = _operands(case._replace(S=max(S, 1)), jnp.bfloat16)
    terms, bias = terms if S else None, bias if center else None
    assert mosaic.supports(x, terms, scale, bias)
    text = _cuda(partial(mosaic.add_norm, epsilon=EPSILON, center=center), x, terms, scale, bias)
    assert text.count("custom_call @mosaic_gpu") == 1


def test_what_the_kernel_does_not_take():
    from pallas_kernels.add_norm import mosaic

    x, terms, scale, _ = _operands(CASES[1], jnp.bfloat16)
    replace = jax.tree_util.Partial(Parts, terms.parts_SRN)
    assert mosaic.supports(x, terms, scale)
    assert not mosaic.supports(x.astype(jnp.float32), terms, scale)
    assert not mosaic.supports(x[:, :-4], None, scale[:-4])
    assert not mosaic.supports(jnp.zeros((129, 96), jnp.bfloat16), None, scale)
    assert not mosaic.supports(x, Parts(terms.parts_SRN.astype(jnp.bfloat16), terms.rows_TX), scale)
    assert not mosaic.supports(x, replace(), scale)  # 11 rows for 3 tokens
    assert not mosaic.supports(x, replace(terms.rows_TX.astype(jnp.int16)), scale)


@pytest.mark.parametrize("implementation", ["cuda", "mosaic"])
def test_an_implementation_that_there_is_not_raises(implementation):
    x, terms, scale, _ = _operands(CASES[1], jnp.float32)
    with pytest.raises(ValueError, match=f"add_norm has no implementation '{implementation}'"):
        add_norm(x, terms, scale, epsilon=EPSILON, center=False, implementation=implementation)
