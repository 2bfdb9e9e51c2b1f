"""The kernel of one row's products, emulated thread by thread on a CPU, against float64."""

import importlib
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import ptx
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic
from tests.pallas_kernels.matvec.test_packed_matvec import _fragments, _x, assert_gated
from tests.thinned import thinned

pytestmark = needs_mosaic
TYPES = ["MXFP4", "Q4_K", "Q4_0", "Q4_1", "Q5_0", "Q5_K", "Q8_0"]
_MODULES = ["matvec.row_sm90", "matvec.strips_sm90", "formats.mxfp4_sm90", "formats.ggml.fragments_sm90"]


def _emulated(monkeypatch: Any, x: jax.Array, parts: list[Any], settings: Any, *, gated: bool = False) -> Any:
    """What the kernel writes."""
    modules = [importlib.import_module(f"pallas_kernels.{name}") for name in _MODULES]
    monkeypatch.setattr(ptx, "launch", launched(*modules))
    row = importlib.import_module("pallas_kernels.matvec.row_sm90")._row.__wrapped__
    return row(x, tuple(parts), settings=settings, gated=gated).astype(np.float64).reshape(-1)


@pytest.mark.parametrize("name", thinned(TYPES, "MXFP4", "Q4_K"))
@pytest.mark.parametrize(("inputs", "share", "strips", "ahead"), [(1280, 4, 1, 2), (512, 2, 6, 0), (256, 1, 4, 0)])
def test_a_product_agrees_with_float64(name, inputs, share, strips, ahead, monkeypatch):
    """Warps with two turns and with one, more strips than there are, and one turn in all."""
    settings = importlib.import_module("pallas_kernels.matvec.row_sm90").Settings(share, strips, ahead)
    x, weight = _x(1, inputs), _fragments(name, 64, inputs)
    kernel, row = np.asarray(weight.dequantize(), np.float64), np.asarray(x, np.float64)[0]
    actual = _emulated(monkeypatch, x, [weight], settings)
    assert np.all(np.abs(actual - kernel @ row) <= 2e-7 * (np.abs(kernel) @ np.abs(row)))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["MXFP4", "Q4_K"])
def test_gate_and_up_agree_with_float64(name, apart, monkeypatch):
    settings = importlib.import_module("pallas_kernels.matvec.row_sm90").Settings(1, 6)
    x, whole = _x(1, 512), _fragments(name, 256, 512)
    kernel, row = np.asarray(whole.dequantize(), np.float64), np.asarray(x, np.float64)[0]
    halves = [jax.tree.map(lambda array, n=n: array[2 * n : 2 * n + 2], whole) for n in range(2)]
    actual = _emulated(monkeypatch, x, halves if apart else [whole], settings, gated=True)
    assert_gated(actual, row, np.split(kernel, 2))
