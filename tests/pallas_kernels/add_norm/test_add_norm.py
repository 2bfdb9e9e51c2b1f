"""`add_norm` and `PartialSum` against float64 NumPy. The kernel is lowered everywhere, and run on Hopper."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.add_norm import add_norm
from pallas_kernels.partial_sum import PartialSum
from tests.oracles.add_norm_numpy import Case, norm, operands, total
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic

EPSILON = 1e-5


CASES = [
    Case(T=1, D=2880, S=3, X=4, E=32, weighted=True),
    Case(T=3, D=96, S=2, X=4, E=5, weighted=True),
    Case(T=7, D=96, S=3),
    Case(T=5, D=88, S=1, E=1),
    Case(T=2, D=64, S=4, X=3, weighted=True),
    Case(T=2, D=64, S=1, X=2, E=3),
]


def _norm(sum_TD: Any, scale: Any, bias: Any, *, center: bool) -> np.ndarray:
    return norm(sum_TD, scale, bias, epsilon=EPSILON, center=center)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_are_summed(case):
    _, terms, *_ = operands(case, jnp.float32)
    actual = jax.jit(PartialSum.total)(terms)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, total(terms), rtol=0, atol=1e-5)


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_numpy(case, dtype, center):
    x, terms, scale, bias = operands(case, dtype)
    bias = bias if center else None
    run = jax.jit(partial(add_norm, epsilon=EPSILON, center=center, implementation="xla"))
    sum_TD, normed_TD = run(x, terms, scale, bias)
    assert sum_TD.dtype == normed_TD.dtype == dtype
    # What is added is rounded, and the sum: each to half a unit in the last place, and what float32's sums of a few
    # numbers add to that.
    rounding = float(jnp.finfo(dtype).eps) / 2 if dtype != jnp.float32 else 0.0
    added = total(terms)
    expected = np.asarray(x, np.float64) + added
    allowed = rounding * (np.abs(expected) + (1 + rounding) * np.abs(added)) + 1e-5
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
    x, _, scale, _ = operands(CASES[1], jnp.bfloat16)
    sum_TD, normed_TD = add_norm(x, None, scale, epsilon=EPSILON, center=False, implementation="xla")
    np.testing.assert_array_equal(sum_TD, x)
    expected = _norm(x, scale, None, center=False)
    np.testing.assert_allclose(np.asarray(normed_TD, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_empty_terms_and_their_weights_have_no_influence():
    x, terms, scale, _ = operands(CASES[4], jnp.float32)
    assert np.isnan(terms.weights_TX).any()
    sum_TD, _ = add_norm(x, terms, scale, epsilon=EPSILON, center=False, implementation="xla")
    assert np.isfinite(sum_TD).all()
    np.testing.assert_allclose(sum_TD[-1], x[-1] + total(terms)[-1], rtol=1e-6, atol=1e-6)


@needs_mosaic
@pytest.mark.parametrize("T", [1, 3, 8, 32, 128])
@pytest.mark.parametrize(
    ("D", "S", "X", "center"),
    [(2880, 3, 4, False), (2880, 5, 0, False), (768, 2, 0, True), (1600, 4, 0, True), (2880, 0, 0, False)],
)
def test_the_kernel_lowers_for_cuda(T, D, S, X, center):
    from pallas_kernels.add_norm import mosaic_sm90

    case = Case(T=T, D=D, S=S, X=X, E=3, weighted=bool(X))
    x, terms, scale, bias = operands(case._replace(S=max(S, 1)), jnp.bfloat16)
    terms, bias = terms if S else None, bias if center else None
    assert mosaic_sm90.supports(x, terms, scale, bias)
    text = lowered(partial(mosaic_sm90.add_norm, epsilon=EPSILON, center=center), x, terms, scale, bias)
    assert text.count("custom_call @mosaic_gpu") == 1


@needs_hopper
@pytest.mark.parametrize("T", [1, 3, 8, 32, 128])
@pytest.mark.parametrize("D", [64, 768, 2880, 8192])
@pytest.mark.parametrize(("S", "X", "center"), [(0, 0, False), (5, 0, False), (2, 0, True), (3, 4, False)], ids=str)
def test_the_kernel_agrees_with_numpy(T, D, S, X, center):
    from pallas_kernels.add_norm import mosaic_sm90

    case = Case(T=T, D=D, S=max(S, 1), X=X, E=5 if X else 1, weighted=bool(X))
    x, terms, scale, bias = operands(case, jnp.bfloat16)
    terms, bias = terms if S else None, bias if center else None
    sum_TD, normed_TD = mosaic_sm90.add_norm(x, terms, scale, bias, epsilon=EPSILON, center=center)
    assert sum_TD.dtype == normed_TD.dtype == jnp.bfloat16
    # Both are rounded once, to half a unit in the last place; the rest is float32's.
    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    expected = np.asarray(x, np.float64) + (total(terms) if S else 0)
    np.testing.assert_allclose(np.asarray(sum_TD, np.float64), expected, rtol=rounding, atol=1e-5)
    expected = _norm(sum_TD, scale, bias, center=center)
    np.testing.assert_allclose(np.asarray(normed_TD, np.float64), expected, rtol=rounding, atol=2e-5)


@needs_mosaic
def test_many_rows_with_terms_in_other_rows_lower_to_the_kernel():
    from pallas_kernels.add_norm import mosaic_sm90

    case = Case(T=2048, D=2880, S=1, X=4, E=32, weighted=True)
    x, terms, scale, _ = operands(case, jnp.bfloat16)
    run = partial(add_norm, epsilon=EPSILON, center=False, implementation="mosaic")
    assert lowered(run, x, terms, scale).count("custom_call @mosaic_gpu") == 1
    plain = PartialSum(jax.ShapeDtypeStruct((1, 2048, 2880), jnp.float32))
    assert not mosaic_sm90.supports(x, plain, scale) and not mosaic_sm90.supports(x, None, scale)
    over = dataclasses.replace(terms, over=("tensor",))
    assert not mosaic_sm90.supports(x, over, scale)


@needs_mosaic
def test_many_rows_emulated_have_the_bits_that_they_have_among_few(monkeypatch):
    from pallas_kernels.add_norm import mosaic_sm90

    monkeypatch.setattr(ptx, "launch", launched(mosaic_sm90))
    x, terms, scale, _ = operands(Case(T=130, D=264, S=1, X=4, E=5, weighted=True), jnp.bfloat16)
    run = partial(mosaic_sm90.add_norm.__wrapped__, epsilon=EPSILON, center=False)
    sum_TD, normed_TD = run(x, terms, scale)
    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    expected = np.asarray(x, np.float64) + total(terms)
    np.testing.assert_allclose(np.asarray(sum_TD, np.float64), expected, rtol=rounding, atol=1e-5)
    expected = _norm(sum_TD, scale, None, center=False)
    np.testing.assert_allclose(np.asarray(normed_TD, np.float64), expected, rtol=rounding, atol=2e-5)
    names = "rows_TX", "weights_TX", "bias_rows_TX"
    few = dataclasses.replace(terms, **{name: getattr(terms, name)[127:] for name in names})
    for one, several in zip(run(x[127:], few, scale), (sum_TD, normed_TD), strict=True):
        np.testing.assert_array_equal(one.view(np.uint16), several[127:].view(np.uint16))


def test_what_the_kernel_does_not_take():
    from pallas_kernels.add_norm import mosaic_sm90

    x, terms, scale, _ = operands(CASES[1], jnp.bfloat16)
    replace = jax.tree_util.Partial(PartialSum, terms.parts_JAO)
    assert mosaic_sm90.supports(x, terms, scale)
    assert not mosaic_sm90.supports(x.astype(jnp.float32), terms, scale)
    assert not mosaic_sm90.supports(x[:, :-4], None, scale[:-4])
    assert not mosaic_sm90.supports(jnp.zeros((129, 96), jnp.bfloat16), None, scale)
    assert not mosaic_sm90.supports(x, PartialSum(terms.parts_JAO.astype(jnp.bfloat16), terms.rows_TX), scale)
    assert not mosaic_sm90.supports(x, replace(), scale)  # 11 rows for 3 tokens
    assert not mosaic_sm90.supports(x, replace(terms.rows_TX.astype(jnp.int16)), scale)


@pytest.mark.parametrize("implementation", ["cuda", "mosaic"])
def test_an_implementation_that_there_is_not_raises(implementation):
    x, terms, scale, _ = operands(CASES[1], jnp.float32)
    with pytest.raises(ValueError, match=f"add_norm has no implementation '{implementation}'"):
        add_norm(x, terms, scale, epsilon=EPSILON, center=False, implementation=implementation)
