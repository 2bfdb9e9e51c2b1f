"""`pallas_kernels.moe` against float64 NumPy (`tests/oracles/moe_numpy.py`), packed and not, one token and many."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.mxfp4 import MXFP4, quantize
from pallas_kernels.moe import moe
from pallas_kernels.moe.reference import LARGEST_GROUP, TOGETHER, group_sizes
from tests.oracles import moe_numpy
from tests.thinned import thinned

SETTINGS = {"alpha": 1.702, "limit": 2.0}  # so low that many values are clamped


class Shape(NamedTuple):
    """Sizes of a case, by `gptjax.axes`."""

    T: int
    D: int
    F: int
    E: int
    X: int


SHAPES = [
    Shape(T=1, D=96, F=64, E=6, X=3),
    Shape(T=7, D=96, F=64, E=6, X=3),
    Shape(T=40, D=32, F=96, E=5, X=4),
    Shape(T=3, D=64, F=32, E=7, X=7),
    Shape(T=2, D=32, F=64, E=128, X=4),
    Shape(T=700, D=64, F=32, E=3, X=2),
    Shape(T=5, D=32, F=64, E=1, X=1),
]


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _ids(shape: Shape) -> str:
    return "-".join(f"{name}{size}" for name, size in shape._asdict().items())


def _operands(shape: Shape, *, packed: bool, dtype: Any = jnp.float32, routing: str = "random") -> list[Any]:
    rng = np.random.default_rng(sum(shape))
    T, D, F, E, X = shape
    x = jnp.asarray(rng.standard_normal((T, D)), dtype)
    experts = np.stack([rng.permutation(E)[:X] for _ in range(T)]).astype(np.int32)
    if routing == "same":
        experts[:] = np.arange(X)
    if routing == "padded":
        experts[rng.random(T) < 0.5] = E
    weights = rng.dirichlet(np.ones(X), T).astype(np.float32)
    gate_up = quantize(jnp.asarray(rng.standard_normal((E, 2 * F, D)) / math.sqrt(D), jnp.float32))
    down = quantize(jnp.asarray(rng.standard_normal((E, D, F)) / math.sqrt(F), jnp.float32))
    bias, other = rng.standard_normal((E, 2 * F)), rng.standard_normal((E, D))
    kernels = (
        [gate_up, down] if packed else [each.dequantize().swapaxes(1, 2).astype(dtype) for each in (gate_up, down)]
    )
    return [x, experts, weights, kernels[0], jnp.asarray(bias, dtype), kernels[1], jnp.asarray(other, dtype)]


@jax.jit
def _moe(*operands: Any) -> jax.Array:
    return moe(*operands, **SETTINGS).total()


def _expected(operands: list[Any]) -> np.ndarray:
    dense = [
        np.asarray(each.dequantize().swapaxes(1, 2) if isinstance(each, MXFP4) else each, np.float64)
        for each in operands
    ]
    return moe_numpy.moe(*dense[:1], np.asarray(operands[1]), *dense[2:], **SETTINGS)


def _check(shape: Shape, **options: Any) -> None:
    operands = _operands(shape, **options)
    actual = _moe(*operands)
    assert actual.dtype == jnp.float32
    dtype = operands[0].dtype
    # Two sums of D and F products of size 1/sqrt(D) and 1/sqrt(F); in half precision the hidden values, up to 6, and
    # their products' weights are rounded too.
    epsilon = float(jnp.finfo(jnp.float32).eps) * (math.sqrt(shape.D) + math.sqrt(shape.F))
    rounded = 4 * float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 0.0
    np.testing.assert_allclose(np.asarray(actual, np.float64), _expected(operands), rtol=0, atol=4 * epsilon + rounded)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("routing", ["random", "same", "padded"])
@pytest.mark.parametrize("shape", thinned(SHAPES, SHAPES[1], SHAPES[4], SHAPES[5]), ids=_ids)
def test_agrees_with_the_oracle(shape, routing, packed):
    _check(shape, packed=packed, routing=routing)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("dtype", thinned([jnp.bfloat16, jnp.float16], jnp.bfloat16))
@pytest.mark.parametrize("shape", thinned(SHAPES[:3], SHAPES[1]), ids=_ids)
def test_half_precision_agrees_with_the_oracle(shape, dtype, packed):
    _check(shape, packed=packed, dtype=dtype)


def test_nothing_is_routed():
    operands = _operands(SHAPES[1], packed=True)
    for nowhere in (SHAPES[1].E, -1):
        operands[1] = np.full_like(operands[1], nowhere)
        assert not np.asarray(_moe(*operands)).any()


@pytest.mark.parametrize("nowhere", [-1, -7, 6, 99])
def test_an_expert_that_there_is_not_changes_no_other_token(nowhere):
    operands = _operands(SHAPES[1], packed=True)
    expected = np.array(_moe(*operands))
    operands[1] = np.where(np.arange(SHAPES[1].T)[:, None] == 3, nowhere, operands[1])
    expected[3] = 0
    np.testing.assert_array_equal(_moe(*operands), expected)


def test_what_lies_at_padding_has_no_influence():
    """NaN in a row that is routed to no expert, and in experts that nobody chose."""
    shape = SHAPES[1]
    x, experts, weights, gate_up, bias, down, other = _operands(shape, packed=False)
    experts = experts % 5
    experts[3] = shape.E
    x = x.at[3].set(jnp.nan)
    gate_up, down, bias, other = (each.at[5].set(jnp.nan) for each in (gate_up, down, bias, other))
    actual = np.asarray(_moe(x, experts, weights, gate_up, bias, down, other))
    assert np.isfinite(actual).all() and not actual[3].any()


@pytest.mark.parametrize("dtype", thinned([jnp.float32, jnp.bfloat16], jnp.bfloat16))
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=_ids)
def test_a_token_has_the_same_bits_whatever_its_company(shape, dtype):
    x, experts, weights, *rest = _operands(shape, packed=True, dtype=dtype)
    expected = np.asarray(_moe(x, experts, weights, *rest))
    order = np.random.default_rng(1).permutation(shape.T)
    np.testing.assert_array_equal(_moe(x[order], experts[order], weights[order], *rest), expected[order])
    alone = np.where(np.arange(shape.T)[:, None] == 2, experts, shape.E)
    np.testing.assert_array_equal(_moe(x, alone, weights, *rest)[2], expected[2])


def test_a_few_experts_numbers_are_unpacked_at_a_time():
    """Never those of all experts. What XLA holds in passing is known when it is compiled."""
    shape = Shape(T=64, D=256, F=256, E=32, X=2)
    operands = _operands(shape, packed=True)
    compiled = _moe.lower(*operands).compile()
    numbers = 4 * 3 * shape.D * shape.F
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * TOGETHER * numbers < numbers * shape.E


@pytest.mark.parametrize("num_experts", [1, 5, 32, 128])
@pytest.mark.parametrize("num_pairs", [1, 4, 31, 32, 33, 4096, 65536])
def test_groups_are_enough(num_pairs, num_experts):
    """Whatever the routing, each pair finds a place; and few places are empty when it is even."""
    places, groups = group_sizes(num_pairs, num_experts)
    rng = np.random.default_rng(num_pairs)
    for counts in (
        np.bincount(rng.integers(0, num_experts, num_pairs), minlength=num_experts),
        np.bincount(np.arange(num_pairs) % num_experts, minlength=num_experts),
        np.bincount(np.zeros(num_pairs, int), minlength=num_experts),
    ):
        assert -(-counts // places).sum() <= groups
    assert places <= LARGEST_GROUP
    assert places * groups <= 3 * num_pairs


def test_an_unknown_implementation_raises():
    with pytest.raises(ValueError, match=r"moe has no implementation 'cuda' for these operands; it has xla"):
        moe(*_operands(SHAPES[0], packed=True), **SETTINGS, implementation="cuda")
