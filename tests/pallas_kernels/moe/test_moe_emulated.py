"""The experts' kernel for few tokens, emulated on a CPU: how many blocks share a sum changes no bit."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.formats import mxfp4_sm90
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import quantize
from pallas_kernels.moe import cluster_sm90, grouped_sm90, mosaic_sm90
from pallas_kernels.moe.activation import SwiGLU
from pallas_kernels.moe.routing import BY_EXPERT, Groups, route
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic

pytestmark = needs_mosaic
E, INPUTS, OUTPUTS = 2, 384, 64
ALPHA, LIMIT = 1.702, 7.0


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The product, on a CPU."""
    monkeypatch.setattr(ptx, "launch", launched(mosaic_sm90, cluster_sm90, mxfp4_sm90))
    return mosaic_sm90.product.__wrapped__


def test_blocks_share_runs_without_a_change(product):
    rng = np.random.default_rng(0)
    weight = quantize(jnp.asarray(rng.standard_normal((E, OUTPUTS, INPUTS)), jnp.float32))
    fragments = MXFP4Fragments.of(weight)
    assert mosaic_sm90.runs_of(fragments) == 3
    x = jnp.asarray(rng.standard_normal((4, INPUTS)), jnp.bfloat16)
    groups = Groups(jnp.asarray([1, 0], jnp.int32), jnp.asarray([[2, 0, 3], [1, -1, -1]], jnp.int32))
    found = []
    for splits, unroll, eights in itertools.product([1, 3], [1, 2], [1, 2]):
        settings = {"runs": 3, "splits": splits, "unroll": unroll, "eights": eights}
        parts = product(x, groups, fragments, **settings)
        assert parts.shape == (splits, 2, 3, OUTPUTS)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        found.append(total)
    numbers, x = np.asarray(weight.dequantize(), np.float64), np.asarray(x, np.float64)
    for group, slot, token, expert in ((0, 0, 2, 1), (0, 1, 0, 1), (0, 2, 3, 1), (1, 0, 1, 0)):
        np.testing.assert_allclose(found[0][group, slot], numbers[expert] @ x[token], rtol=0, atol=1e-5)
        for other in found[1:]:
            np.testing.assert_array_equal(other[group, slot], found[0][group, slot])


@pytest.fixture(scope="module")
def network() -> Any:
    """Tokens, weights and biases of the product up, its fragments, and what it should give of each token and expert.

    The second of three runs is the first with the other sign, and both are large: what is left of them, if runs are
    added otherwise than in order, or if there are none, is as large as the third run.
    """
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal((E, 2 * OUTPUTS, INPUTS))
    numbers[..., INPUTS // 3 : 2 * INPUTS // 3] = numbers[..., : INPUTS // 3]
    weight = quantize(jnp.asarray(numbers, jnp.float32))
    x = rng.standard_normal((12, INPUTS))
    x[:, : INPUTS // 3] *= 2.0**21
    x[:, INPUTS // 3 : 2 * INPUTS // 3] = -x[:, : INPUTS // 3]
    x, bias = jnp.asarray(x / 16, jnp.bfloat16), jnp.asarray(rng.standard_normal((E, 2 * OUTPUTS)), jnp.bfloat16)
    exact = [np.asarray(each, np.float64) for each in (x, weight.dequantize(), bias)]
    sums_ETO = np.einsum("ti,eoi->eto", *exact[:2]) + exact[2][:, None]
    gate, up = np.minimum(sums_ETO[..., ::2], LIMIT), np.clip(sums_ETO[..., 1::2], -LIMIT, LIMIT)
    return x, bias, MXFP4Fragments.of(weight), gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)


def _hidden(product: Any, network: Any, groups: Groups, **settings: Any) -> np.ndarray:
    x, bias, fragments, _ = network
    runs = mosaic_sm90.runs_of(fragments)
    return product(x, groups, fragments, bias, activation=SwiGLU(ALPHA, LIMIT), runs=runs, **settings)


def test_a_cluster_shares_runs_without_a_change(product, network):
    """Also with groups that have no token, or whose expert does not exist: all of their blocks return."""
    rows = [[2, 0, 3, 5, 7, 6, 1, 4, 8], [1, *[-1] * 8], [-1] * 9, *[[9, 10, *[-1] * 7]] * 2]
    groups = Groups(jnp.asarray([1, 0, 0, E, -1], jnp.int32), jnp.asarray(rows, jnp.int32))
    found = [
        _hidden(product, network, groups, splits=splits, unroll=unroll, eights=eights)
        for splits, unroll, eights in ((1, 2, 1), (3, 2, 1), (3, 1, 2), (2, 1, 1))
    ]
    assert all(np.isnan(each[2:].astype(np.float32)).all() for each in found)  # not written
    for place, token in np.ndenumerate(rows[:2]):
        if token >= 0:
            hidden = found[0][place].astype(np.float64)
            np.testing.assert_allclose(hidden, network[3][1 - place[0], token], rtol=2**-8, atol=1e-5)
            assert {each[place].tobytes() for each in found} == {found[0][place].tobytes()}


def test_a_token_up_has_the_same_bits_among_any_number(product, network):
    experts = np.asarray([[1, 0], [0, 1], *[[1, -1], [E, 0]] * 5], np.int32)
    found = []
    for tokens, splits, eights in ((1, 3, 1), (1, 1, 1), (2, 3, 1), (12, 3, 1), (12, 1, 2)):
        groups, places = route(jnp.asarray(experts[:tokens]), E)
        hidden = _hidden(product, network, groups, splits=splits, unroll=1, eights=eights)
        found.append(hidden.reshape(-1, OUTPUTS)[np.asarray(places)[0]])
    for expert, one in zip(experts[0], found[0], strict=True):
        np.testing.assert_allclose(one.astype(np.float64), network[3][expert, 0], rtol=2**-8, atol=1e-5)
    for other in found[1:]:
        np.testing.assert_array_equal(other.view(np.uint16), found[0].view(np.uint16))


@pytest.mark.parametrize(
    ("kernel", "tokens", "expected"),
    [(mosaic_sm90, 1, 3), (mosaic_sm90, BY_EXPERT, 3), (grouped_sm90, BY_EXPERT, 3), (grouped_sm90, BY_EXPERT + 1, 1)],
)
def test_the_kernels_have_the_same_runs_up_and_down(kernel, tokens, expected, monkeypatch):
    runs, product = [], kernel.product
    monkeypatch.setattr(kernel, "product", lambda *given, **more: runs.append(more["runs"]) or product(*given, **more))
    D, F, X = INPUTS, 192, 2
    x, experts, weights = (
        jax.ShapeDtypeStruct((tokens, width), dtype)
        for width, dtype in ((D, jnp.bfloat16), (X, jnp.int32), (X, jnp.float32))
    )
    layer = []
    for outputs, inputs in ((2 * F, D), (D, F)):
        words = jax.ShapeDtypeStruct((E, outputs // 64, inputs // 64, 128, 4), jnp.uint32)
        scales = jax.ShapeDtypeStruct((E, outputs // 64, inputs // 64, 64), jnp.uint16)
        layer += [MXFP4Fragments(words, scales), jax.ShapeDtypeStruct((E, outputs), jnp.bfloat16)]
    jax.eval_shape(partial(kernel.routed, alpha=ALPHA, limit=LIMIT), x, experts, weights, *layer)
    assert runs == [expected] * 2
