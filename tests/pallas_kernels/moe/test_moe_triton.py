"""The experts' Triton kernel against float64 NumPy, interpreted where there is no GPU; and that it lowers for CUDA."""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.formats.fragments import LARGEST_SCALE, TILE, MXFP4Fragments
from pallas_kernels.formats.mxfp4 import BLOCK, MIN_SCALE, MXFP4, quantize
from pallas_kernels.moe import api, moe, triton
from pallas_kernels.moe.routing import Groups
from tests.oracles import moe_numpy
from tests.pallas_kernels.marks import lowered_for_h200
from tests.thinned import thinned

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
INTERPRET = dispatch.preferred() == dispatch.XLA
SETTINGS = {"alpha": 1.702, "limit": 2.0}  # so low that many values are clamped
BF16 = float(jnp.finfo(jnp.bfloat16).eps)


class Shape(NamedTuple):
    """Sizes of a case, by `gptjax.axes`."""

    T: int
    D: int
    F: int
    E: int
    X: int


SHAPES = [
    Shape(T=1, D=192, F=64, E=6, X=3),
    Shape(T=7, D=64, F=192, E=5, X=2),
    Shape(T=20, D=128, F=64, E=3, X=1),  # so that some groups need two programs
    Shape(T=3, D=64, F=64, E=1, X=1),
    Shape(T=140, D=64, F=64, E=3, X=2),
]


def _ids(shape: Shape) -> str:
    return "-".join(f"{name}{size}" for name, size in shape._asdict().items())


def _operands(shape: Shape, routing: str = "random") -> list[Any]:
    rng = np.random.default_rng(sum(shape))
    T, D, F, E, X = shape
    x = jnp.asarray(rng.standard_normal((T, D)), jnp.bfloat16)
    experts = np.stack([rng.permutation(E)[:X] for _ in range(T)]).astype(np.int32)
    if routing == "same":
        experts[:] = np.arange(X)
    if routing == "padded":
        experts[::2] = E
        experts[T // 2, 0] = -1
    weights = rng.dirichlet(np.ones(X), T).astype(np.float32)
    gate_up = quantize(jnp.asarray(rng.standard_normal((E, 2 * F, D)) / math.sqrt(D), jnp.float32))
    down = quantize(jnp.asarray(rng.standard_normal((E, D, F)) / math.sqrt(F), jnp.float32))
    biases = [jnp.asarray(rng.standard_normal((E, n)), jnp.bfloat16) for n in (2 * F, D)]
    return [x, experts, weights, MXFP4Fragments.of(gate_up), biases[0], MXFP4Fragments.of(down), biases[1]]


@jax.jit
def _routed(*operands: Any) -> jax.Array:
    return triton.routed(*operands, **SETTINGS, interpret=INTERPRET).total()


def _float64(operand: Any) -> np.ndarray:
    if isinstance(operand, MXFP4Fragments):
        operand = operand.dequantize().swapaxes(1, 2)
    return np.asarray(operand, np.float64)


@pytest.mark.parametrize("routing", ["random", "same", "padded"])
@pytest.mark.parametrize("shape", thinned(SHAPES, SHAPES[1], SHAPES[2], SHAPES[4]), ids=_ids)
def test_agrees_with_the_oracle(shape, routing):
    operands = _operands(shape, routing)
    actual = _routed(*operands)
    assert actual.dtype == jnp.float32
    x, experts, *rest = operands
    expected = moe_numpy.moe(_float64(x), experts, *map(_float64, rest), **SETTINGS)
    # What is rounded are the hidden values, of up to 6 and mostly about 1, each to half a last place.
    assert np.linalg.norm(actual - expected) <= BF16 * np.linalg.norm(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * BF16)


def test_nothing_is_routed():
    operands = _operands(SHAPES[1])
    for nowhere in (SHAPES[1].E, -1):
        operands[1] = np.full_like(operands[1], nowhere)
        assert not np.asarray(_routed(*operands)).any()


def test_what_lies_at_padding_has_no_influence():
    """NaN in a row that is routed to no expert, and in an expert that nobody chose."""
    shape = SHAPES[1]
    x, experts, weights, gate_up, bias, down, other = _operands(shape)
    experts = experts % 4
    experts[3] = shape.E
    expected = np.asarray(_routed(x, experts, weights, gate_up, bias, down, other))
    x = x.at[3].set(jnp.nan)
    gate_up, down = (MXFP4Fragments(each.words, each.scales.at[4].set(0xFFFF)) for each in (gate_up, down))
    bias, other = (each.at[4].set(jnp.nan) for each in (bias, other))
    actual = np.asarray(_routed(x, experts, weights, gate_up, bias, down, other))
    np.testing.assert_array_equal(actual, expected)
    assert not actual[3].any()


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=_ids)
def test_a_token_has_the_same_bits_whatever_its_company(shape):
    x, experts, weights, *rest = _operands(shape)
    expected = np.asarray(_routed(x, experts, weights, *rest))
    order = np.random.default_rng(1).permutation(shape.T)
    np.testing.assert_array_equal(_routed(x[order], experts[order], weights[order], *rest), expected[order])
    alone = np.where(np.arange(shape.T)[:, None] == 2, experts, shape.E)
    np.testing.assert_array_equal(_routed(x, alone, weights, *rest)[2], expected[2])


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_every_code_at_every_scale(splits):
    """All that a byte of blocks and a scale that `repacked` lets pass can be, in each place of a tile."""
    N, K = 64, 192
    rng = np.random.default_rng(splits)
    scales = rng.integers(MIN_SCALE, LARGEST_SCALE + 1, (2, N, K // BLOCK)).astype(np.uint8)
    scales[0, :2] = [[MIN_SCALE], [LARGEST_SCALE]]
    blocks = rng.integers(0, 256, (2, N, K // BLOCK, BLOCK // 2)).astype(np.uint8)
    packed = MXFP4(jnp.asarray(blocks), jnp.asarray(scales))
    x = jnp.asarray(rng.standard_normal((3, K)), jnp.bfloat16)
    groups = Groups(jnp.asarray([1, 0], jnp.int32), jnp.asarray([[2, -1], [0, 1]], jnp.int32))
    run = partial(triton.product, groups=groups, weight=MXFP4Fragments.of(packed), splits=splits, interpret=INTERPRET)
    actual = np.asarray(run(x))  # which may be anything in empty slots
    assert actual.shape == (math.gcd(splits, K // TILE), 2, 2, N)
    x, weight = np.asarray(x, np.float64), np.asarray(packed.dequantize(), np.float64)
    for group, slot, token, expert in ((0, 0, 2, 1), (1, 0, 0, 0), (1, 1, 1, 0)):
        error = np.abs(actual[:, group, slot].sum(axis=0, dtype=np.float64) - weight[expert] @ x[token])
        # Sums of K float32 numbers, in any order. Each product that is no normal number may be lost.
        lost = K * float(np.finfo(np.float32).tiny)
        assert (error <= 2e-6 * np.abs(weight[expert]) @ np.abs(x[token]) + lost).all()


def test_weights_are_repacked_for_it():
    weight = quantize(jnp.ones((2, 64, 128)))
    assert isinstance(api.repacked(weight, "triton"), MXFP4Fragments)
    assert isinstance(api.repacked(quantize(jnp.ones((2, 96, 64))), "triton"), MXFP4)


def test_what_it_does_not_take():
    x, experts, weights, gate_up, bias, down, other = _operands(SHAPES[0])
    with pytest.raises(ValueError, match="no implementation 'triton' for these operands; it has xla"):
        moe(x, experts, weights, gate_up.unpacked(), bias, down.unpacked(), other, **SETTINGS, implementation="triton")
    with pytest.raises(ValueError, match="no implementation 'triton' for these operands; it has xla"):
        moe(x.astype(jnp.float32), experts, weights, gate_up, bias, down, other, **SETTINGS, implementation="triton")


@pytest.mark.parametrize("T", [1, 8, 64, 200])
def test_lowers_for_cuda(T):
    E, D, F, X = 32, 2880, 2880, 4
    shape = jax.ShapeDtypeStruct
    up, down = (
        MXFP4Fragments(shape((E, N // 64, K // 64, 128, 4), jnp.uint32), shape((E, N // 64, K // 64, 64), jnp.uint16))
        for N, K in ((2 * F, D), (D, F))
    )
    operands = (
        shape((T, D), jnp.bfloat16),
        shape((T, X), jnp.int32),
        shape((T, X), jnp.float32),
        up,
        shape((E, 2 * F), jnp.bfloat16),
        down,
        shape((E, D), jnp.bfloat16),
    )
    text = lowered_for_h200(lambda *each: moe(*each, **SETTINGS, implementation="triton").total(), *operands)
    assert len(re.findall(r"custom_call @\S*triton", text)) == 2
