"""The Hopper kernels of a decode step: a row has the bits that it has alone, however many rows there are."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.layers.mlp import GatedMLP
from gptjax.layers.norm import RMSNorm
from gptjax.layers.residual import Residual
from pallas_kernels.add_norm import add_norm
from pallas_kernels.attention import append_and_attend
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import BLOCK, MXFP4
from pallas_kernels.moe import moe
from pallas_kernels.pages import PAGE
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.route import norm_route
from tests.pallas_kernels.marks import needs_hopper

pytestmark = needs_hopper
ROWS = [2, 3, 8, 16, 32, 33, 64, 128]
MOST, EPSILON = 128, 1e-5
SETTINGS = {"alpha": 1.702, "limit": 7.0, "implementation": "mosaic"}


def _assert_alone(run: Any, operands: list[Any]) -> None:
    """That the first, the last and other rows of each number of rows have the bits that they have alone.

    All operands are by row.
    """

    def of(rows: slice) -> list[np.ndarray]:
        return [np.asarray(each) for each in jax.tree.leaves(run(*(operand[rows] for operand in operands)))]

    compared = sorted({0, 1, 5, *(T - 1 for T in ROWS)})
    alone = {row: of(slice(row, row + 1)) for row in compared}
    for T in ROWS:
        together = of(slice(T))
        for row in (each for each in compared if each < T):
            for number, (one, several) in enumerate(zip(alone[row], together, strict=True)):
                assert one[0].tobytes() == several[row].tobytes(), f"result {number} of row {row} of {T}"


def _terms(parts_TJD: jax.Array) -> PartialSum:
    return PartialSum(parts_TJD.swapaxes(0, 1))


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("D", [64, 768, 1600, 2880, 4096, 8192])
def test_of_a_norm(D, center):
    rng = np.random.default_rng(D)
    x, scale, bias = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((MOST, D), D, D))
    parts = jnp.asarray(rng.standard_normal((MOST, 3, D)), jnp.float32)
    settings: dict[str, Any] = {"epsilon": EPSILON, "center": center, "implementation": "mosaic"}

    def run(x: jax.Array, parts: jax.Array) -> Any:
        return add_norm(x, _terms(parts), scale, bias if center else None, **settings)

    _assert_alone(jax.jit(run), [x, parts])


@pytest.mark.parametrize(("D", "E"), [(64, 8), (768, 16), (2880, 32), (2048, 64), (2880, 128), (8192, 128)])
def test_of_a_choice(D, E):
    rng = np.random.default_rng(D + E)
    x, scale, router, bias = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((MOST, D), D, (D, E), E)
    )
    router = router / np.sqrt(D).astype(jnp.bfloat16)
    parts, positions = jnp.asarray(rng.standard_normal((MOST, 5, D)), jnp.float32), jnp.arange(MOST, dtype=jnp.int32)
    choice = {"router_DE": router, "router_bias_E": bias, "top": 4, "epsilon": EPSILON, "implementation": "mosaic"}

    def run(x: jax.Array, parts: jax.Array, positions: jax.Array) -> Any:
        return norm_route(x, _terms(parts), scale, positions_T=positions, **choice)

    _assert_alone(jax.jit(run), [x, parts, positions])


def _experts(rng: np.random.Generator, E: int, outputs: int, inputs: int) -> MXFP4Fragments:
    blocks = rng.integers(0, 256, (E, outputs, inputs // BLOCK, BLOCK // 2), np.uint8)
    scales = rng.integers(119, 123, (E, outputs, inputs // BLOCK), np.uint8)
    return MXFP4Fragments.of(MXFP4(jnp.asarray(blocks), jnp.asarray(scales)))


SHAPES = [(32, 2880, 2880, 4), (8, 320, 192, 4), (5, 64, 448, 2), (128, 64, 576, 4)]  # E, D, F, X


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def network(request: pytest.FixtureRequest) -> Any:
    """What a layer of experts does with rows, their experts and weights, and the operands by row."""
    E, D, F, X = request.param
    rng = np.random.default_rng(E)
    up, down = _experts(rng, E, 2 * F, D), _experts(rng, E, D, F)
    up_bias, down_bias = (jnp.asarray(rng.standard_normal((E, n)), jnp.bfloat16) for n in (2 * F, D))
    x, scale = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((MOST, D), D))
    experts = np.stack([rng.permutation(E)[:X] for _ in range(MOST)]).astype(np.int32)
    weights = rng.dirichlet(np.ones(X), MOST).astype(np.float32)

    @jax.jit
    def run(layer: Any, x: jax.Array, experts: jax.Array, weights: jax.Array) -> Any:
        update = moe(x, experts, weights, *layer, **SETTINGS)
        return add_norm(x, update, scale, epsilon=EPSILON, center=False, implementation="mosaic")

    return partial(run, (up, up_bias, down, down_bias)), [x, experts, weights]


def test_of_experts(network):
    _assert_alone(*network)


def test_of_experts_that_all_rows_choose(network):
    run, (x, experts, weights) = network
    _assert_alone(run, [x, np.broadcast_to(experts[:1], experts.shape), weights])


@pytest.mark.parametrize(("H", "normed"), [(64, False), (128, True)])
def test_of_attention_that_appends(H, normed):
    rng, N, K = np.random.default_rng(0), 8, 2
    scales = tuple(jnp.asarray(rng.standard_normal(H), jnp.bfloat16) for _ in "qk") if normed else None
    parts = jnp.asarray(rng.standard_normal((MOST, 3, (N + 2 * K) * H)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((1, parts.shape[2])), jnp.bfloat16)
    angle = rng.uniform(-3, 3, (MOST, H // 2)).astype(np.float32)
    positions = rng.integers(0, PAGE, MOST).astype(np.int32)

    def run(parts: jax.Array, cos: jax.Array, sin: jax.Array, positions: jax.Array) -> Any:
        rows = len(positions)
        empty = jnp.zeros((1 + rows, K, PAGE, H), jnp.bfloat16)
        table = 1 + jnp.arange(rows, dtype=jnp.int32)[:, None]
        qkv = PartialSum(parts.swapaxes(0, 1), bias_EO=bias)
        more = {"scale": H**-0.5, "scales": scales, "epsilon": EPSILON}
        out, k, v = append_and_attend(qkv, (cos, sin), positions, empty, empty, table, **more)
        return out, k[1:], v[1:]

    _assert_alone(jax.jit(run), [parts, np.cos(angle), np.sin(angle), positions])


class _NormedMLP(nn.Module):
    width: int

    def setup(self) -> None:
        dtypes: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "implementation": "mosaic"}
        self.norm = RMSNorm(EPSILON, **dtypes)
        self.mlp = GatedMLP(self.width, use_bias=False, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(self.norm(Residual(x)))[1].total()


@pytest.mark.parametrize(("D", "F"), [(1024, 3072), (4096, 14336)])
def test_of_a_gated_mlp(D, F):
    """XLA computes its activation, and left out the rounding of one row's gate and up."""
    mlp, x = _NormedMLP(F), jnp.asarray(np.random.default_rng(D).standard_normal((MOST, 1, D)), jnp.bfloat16)
    params = jax.jit(mlp.init)(jax.random.key(D), x[:1])
    _assert_alone(jax.jit(partial(mlp.apply, params)), [x])
