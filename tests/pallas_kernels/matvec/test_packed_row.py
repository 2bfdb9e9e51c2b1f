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
from pallas_kernels.ptx import rows
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic
from tests.pallas_kernels.matvec.test_packed_matvec import EPSILON, WHAT, _fragments, _x, assert_gated, to_norm
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


@pytest.mark.parametrize(("inputs", "share", "strips", "ahead"), [(64, 1, 4, 0), (704, 2, 2, 0), (1472, 2, 6, 2)])
def test_a_row_may_end_within_a_turn(inputs, share, strips, ahead):
    """In MXFP4, after one, three and again three of its last four tiles; nothing beyond the matrix is read."""
    x, weight = _x(1, inputs), _fragments("MXFP4", 128, inputs)
    takes = importlib.import_module("pallas_kernels.matvec.row_sm90").takes
    assert takes(x, [weight]) and not takes(x, [_fragments("Q8_0", 128, inputs)])
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


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[set[float]]:
    """What the threads of each cluster or block take for the sum of squares: few of its bits show in the norm."""
    norm, found = importlib.import_module("pallas_kernels.matvec.norm_sm90"), []

    def recorded(add_up: Any) -> Any:
        def run(*operands: Any) -> Any:
            total = add_up(*operands)
            found.append(set(total))
            return total

        return run

    monkeypatch.setattr(norm.BlockNorm, "_row_sum", recorded(norm.BlockNorm._row_sum))
    monkeypatch.setattr(rows, "row_sum", recorded(rows.row_sum))
    return found


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", ["MXFP4", "Q4_K"])
def test_a_norm_has_the_bits_of_add_norm(name, what, sums):
    """With fewer threads than eights of numbers, and in several blocks."""
    _assert_normed(to_norm(1280, what), _fragments(name, 128, 1280), _settings(1, 4))
    assert len(sums) == 3
    assert what in ("NaN", "large") or len(set.union(*sums)) == 1


@pytest.mark.parametrize(
    ("inputs", "gated"), [(256, False), (768, True), thorough(3584, True), thorough(4096, False), thorough(8192, True)]
)
def test_norms_of_every_width_have_the_bits_of_add_norm(inputs, gated, sums):
    """In a single block, too."""
    settings = _settings(1, 4) if inputs == 256 else _settings(2, 6) if gated else _settings(4, 3)
    weight = _fragments("MXFP4", 64 * (1 + gated), inputs)
    _assert_normed(to_norm(inputs), weight, settings, gated=gated)
    assert len(set.union(*sums)) == 1


@pytest.mark.parametrize("inputs", [256, 768, 1280, 1536, 2048])
def test_squares_are_added_as_in_add_norm(inputs, sums):
    """Both add up strips by trees of the same shape, and then the strips."""
    for what in ("many sizes", "a large strip"):
        sums.clear()
        _assert_normed(to_norm(inputs, what), _fragments("MXFP4", 64, inputs), _settings(1, 4))
        assert len(sums) == 2 and len(set.union(*sums)) == 1


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
