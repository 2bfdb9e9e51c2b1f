"""The kernel of one row's products, emulated thread by thread on a CPU, against float64.

If the kernel also norms the row, what it writes has the bits of `add_norm`'s kernel, also emulated, and a product.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.matvec import RowNorm
from pallas_kernels.partial_sum import PartialSum
from tests.oracles import add_norm_numpy
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic
from tests.pallas_kernels.matvec.test_packed_matvec import _fragments, _x, assert_gated
from tests.thinned import thinned, thorough

pytestmark = needs_mosaic
TYPES = ["MXFP4", "Q4_K", "Q4_0", "Q4_1", "Q5_0", "Q5_K", "Q8_0"]
_MODULES = [
    "add_norm.mosaic_sm90",
    "matvec.norm_sm90",
    "matvec.row_sm90",
    "matvec.strips_sm90",
    "formats.mxfp4_sm90",
    "formats.ggml.fragments_sm90",
]
EPSILON = 1e-6


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulates all kernels."""
    modules = [importlib.import_module(f"pallas_kernels.{name}") for name in _MODULES]
    monkeypatch.setattr(ptx, "launch", launched(*modules))


def _settings(*numbers: int) -> Any:
    return importlib.import_module("pallas_kernels.matvec.row_sm90").Settings(*numbers)


def _written(x: jax.Array | RowNorm, parts: list[Any], settings: Any, *, gated: bool = False) -> dict[str, Any]:
    """What the kernel writes."""
    row = importlib.import_module("pallas_kernels.matvec.row_sm90")._row.__wrapped__
    return row(x, tuple(parts), settings=settings, gated=gated)


def _emulated(x: jax.Array, parts: list[Any], settings: Any, *, gated: bool = False) -> Any:
    """The product that the kernel writes."""
    return _written(x, parts, settings, gated=gated)["out"].astype(np.float64).reshape(-1)


@pytest.mark.parametrize("name", thinned(TYPES, "MXFP4", "Q4_K"))
@pytest.mark.parametrize(("inputs", "share", "strips", "ahead"), [(1280, 4, 1, 2), (512, 2, 6, 0), (256, 1, 4, 0)])
def test_a_product_agrees_with_float64(name, inputs, share, strips, ahead):
    """Warps with two turns and with one, more strips than there are, and one turn in all."""
    x, weight = _x(1, inputs), _fragments(name, 64, inputs)
    kernel, row = np.asarray(weight.dequantize(), np.float64), np.asarray(x, np.float64)[0]
    actual = _emulated(x, [weight], _settings(share, strips, ahead))
    assert np.all(np.abs(actual - kernel @ row) <= 2e-7 * (np.abs(kernel) @ np.abs(row)))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["MXFP4", "Q4_K"])
def test_gate_and_up_agree_with_float64(name, apart):
    x, whole = _x(1, 512), _fragments(name, 256, 512)
    kernel, row = np.asarray(whole.dequantize(), np.float64), np.asarray(x, np.float64)[0]
    halves = [jax.tree.map(lambda array, n=n: array[2 * n : 2 * n + 2], whole) for n in range(2)]
    actual = _emulated(x, halves if apart else [whole], _settings(1, 6), gated=True)
    assert_gated(actual, row, np.split(kernel, 2))


def _to_norm(inputs: int, what: str) -> RowNorm:
    """A row and what is added to it."""
    case = add_norm_numpy.Case(1, inputs, E=1 if what == "a bias" else 0)
    x, terms, scale, _ = add_norm_numpy.operands(case, jnp.bfloat16)
    if what == "float32":
        scale = scale.astype(jnp.float32) + 1e-3
        terms = PartialSum(terms.parts_JAO, bias_EO=jnp.ones((1, inputs)) / 3)
    elif what == "NaN":
        x = x.at[0, inputs // 2].set(jnp.nan)
    elif what == "large":
        terms = PartialSum(3e38 * terms.parts_JAO)  # squares are infinite, and some sums too
    return RowNorm(x[None], None if what == "nothing" else terms, scale, EPSILON)


@pytest.mark.parametrize("what", ["a term", "nothing", "a bias", "float32", "NaN", "large"])
@pytest.mark.parametrize("name", ["MXFP4", "Q4_K"])
def test_a_norm_has_the_bits_of_add_norm(name, what):
    """With fewer threads than eights of numbers, and in several blocks."""
    _assert_normed(_to_norm(1280, what), _fragments(name, 128, 1280), _settings(1, 4))


@pytest.mark.parametrize(
    ("inputs", "gated"), [(256, False), (768, True), thorough(3584, True), thorough(4096, False), thorough(8192, True)]
)
def test_norms_of_every_width_have_the_bits_of_add_norm(inputs, gated):
    settings = _settings(2, 6) if gated else _settings(4, 3)
    if inputs == 256:
        settings = _settings(1, 4)
    _assert_normed(_to_norm(inputs, "a term"), _fragments("MXFP4", 128, inputs), settings, gated=gated)


def _assert_normed(norm: RowNorm, weight: Any, settings: Any, *, gated: bool = False) -> None:
    """That the kernel writes what those of `add_norm` and of a product of the norm write."""
    add_norm = importlib.import_module("pallas_kernels.add_norm.mosaic_sm90").add_norm.__wrapped__
    with np.errstate(over="ignore", invalid="ignore"):
        sum_TD, normed_TD = add_norm(norm.x[0], norm.terms, norm.scale_D, epsilon=EPSILON, center=False)
        expected = _written(jnp.asarray(normed_TD), [weight], settings, gated=gated)["out"]
        actual = _written(norm, [weight], settings, gated=gated)
    assert actual["out"].tobytes() == expected.tobytes()
    assert ("sum" in actual) == (norm.terms is not None)
    if "sum" in actual:
        assert actual["sum"].shape == norm.x.shape
        assert actual["sum"].tobytes() == np.asarray(sum_TD).tobytes()
