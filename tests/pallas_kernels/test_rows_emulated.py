"""The kernels that add up rows, emulated on a CPU: a row's bits are the same however many blocks share it."""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.add_norm import mosaic_sm90 as add_norm
from pallas_kernels.ptx import rows
from pallas_kernels.ptx.rows import RowLayout
from pallas_kernels.route import choice_sm90
from pallas_kernels.route import mosaic_sm90 as route
from tests.oracles import add_norm_numpy
from tests.oracles.add_norm_numpy import Case
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic

pytestmark = needs_mosaic
EPSILON = 1e-5
WIDTHS = [64, 88, 768, 1600, 2176, 2880]


def _layouts(width: int) -> list[int]:
    """Numbers of rows, of which each makes other numbers of blocks."""
    return [count for count in (1, 32, 64, 128) if count == 1 or RowLayout.of(count, width) != RowLayout.of(1, width)]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a kernel on a CPU, laid out as for another number of rows than it is given."""

    def run(kernel: Any, num_rows: int, *operands: Any, **settings: Any) -> tuple[np.ndarray, ...]:
        of = RowLayout.of
        with monkeypatch.context() as patch:
            patch.setattr(RowLayout, "of", lambda _, width, **more: of(num_rows, width, **more))
            patch.setattr(ptx, "launch", launched(add_norm, route, choice_sm90))
            return kernel.__wrapped__(*operands, **settings)

    return run


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_has_the_same_bits_in_each_layout(emulated, width, center):
    case = Case(T=2, D=width, S=2, X=3, E=3, weighted=True)
    x, terms, scale, bias = add_norm_numpy.operands(case, jnp.bfloat16)
    run = partial(emulated, add_norm.add_norm, epsilon=EPSILON, center=center)
    found = [run(count, x, terms, scale, bias if center else None) for count in _layouts(width)]
    summed, normed = (np.asarray(each, np.float64) for each in found[0])
    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    expected = np.asarray(x, np.float64) + add_norm_numpy.total(terms)
    np.testing.assert_allclose(summed, expected, rtol=rounding, atol=1e-5)
    expected = add_norm_numpy.norm(summed, scale, bias if center else None, epsilon=EPSILON, center=center)
    np.testing.assert_allclose(normed, expected, rtol=rounding, atol=2e-5)
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(np.asarray(one).view(np.uint16), np.asarray(another).view(np.uint16))


@pytest.mark.parametrize(("width", "experts"), [(64, 8), (768, 16), (2880, 32), (2176, 64), (2880, 128)])
def test_a_choice_has_the_same_bits_in_each_layout(emulated, width, experts):
    rng = np.random.default_rng(width)
    x, router = rng.standard_normal((2, width)), rng.standard_normal((width, experts)) / np.sqrt(width)
    x, router, bias = (jnp.asarray(each, jnp.bfloat16) for each in (x, router, rng.standard_normal(experts)))
    scale, positions = jnp.ones(width, jnp.bfloat16), jnp.asarray([3, -1], jnp.int32)
    run = partial(emulated, route.norm_route, epsilon=EPSILON, top=4)
    found = [run(count, x, None, scale, router, bias, positions) for count in _layouts(width)]
    _, normed, chosen, weights = found[0]
    logits = np.asarray(normed, np.float64)[0] @ np.asarray(router, np.float64) + np.asarray(bias, np.float64)
    logits = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)
    best = np.argsort(-logits, kind="stable")[:4]
    np.testing.assert_array_equal(chosen, [best, [-1] * 4])
    expected = np.exp(logits[best] - logits[best[0]])
    np.testing.assert_allclose(weights[0], expected / expected.sum(), rtol=0, atol=1e-6)
    for other in found[1:]:
        np.testing.assert_array_equal(other[2], chosen)
        np.testing.assert_array_equal(other[3][0], weights[0])


@pytest.mark.parametrize("width", [64, 768, 1600, 2048, 2176, 2880, 4096, 8192])
def test_each_float4_is_one_threads(width):
    for count in range(1, 129):
        layout = RowLayout.of(count, width)
        assert layout.blocks <= layout.parts and layout.parts % layout.blocks == 0
        assert layout.blocks == 1 or count * layout.blocks <= 128
        assert layout.blocks * layout.per >= width // 4
        assert layout.turns * layout.threads >= layout.float4s
        assert layout.per % (rows.STRIP // 4) == 0
        assert dataclasses.replace(layout, blocks=1).strips == layout.strips
