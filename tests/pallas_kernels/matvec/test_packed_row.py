"""The kernel of one row's products, emulated thread by thread on a CPU, against float64."""

import importlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.pallas_kernels.emulated_ptx import Emulator
from tests.pallas_kernels.marks import needs_mosaic
from tests.pallas_kernels.matvec.test_packed_matvec import _fragments, _x, assert_gated
from tests.thinned import thinned

pytestmark = needs_mosaic
TYPES = ["MXFP4", "Q4_K", "Q4_0", "Q4_1", "Q5_0", "Q5_K", "Q8_0"]
_MODULES = ["matvec.row_sm90", "matvec.strips_sm90", "formats.mxfp4_sm90", "formats.ggml.fragments_sm90"]


def _emulated(monkeypatch: Any, x: jax.Array, parts: list[Any], outputs: int, settings: Any, matrices: int) -> Any:
    """What the kernel writes."""
    row = importlib.import_module("pallas_kernels.matvec.row_sm90")
    second = outputs // 16 if matrices == 2 and len(parts) == 1 else 0
    plan = row._RowPlan(x.shape[1], outputs, matrices, second, settings, row.strip_of(parts[0]))
    emulator = Emulator(plan.threads)
    for name in _MODULES:
        module = importlib.import_module(f"pallas_kernels.{name}")
        for each in ("ptx", "arith", "utils"):
            if hasattr(module, each):
                monkeypatch.setattr(module, each, getattr(emulator, each))
    pieces = [(n, part, piece.array) for n, part in enumerate(parts) for piece in plan.kind.pieces]
    arrays = {f"{array}{n}": emulator.array(getattr(part, array)) for n, part, array in pieces}
    arrays["x"] = emulator.array(x)
    out = emulator.array(np.full(outputs, np.nan, np.float32 if matrices == 1 else ml_dtypes.bfloat16))
    for group in range(-(-outputs // (16 * settings.strips))):
        names = ("staged", "of_runs", "of_warps")
        shared = emulator.share(2 * plan.inner + 512, plan.inner // 8, 64 * plan.warps)
        row.packed_row(plan, out=out, group=np.int32(group), **arrays, **dict(zip(names, shared, strict=True)))
    return emulator.result(out, outputs, np.float32 if matrices == 1 else ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("name", thinned(TYPES, "MXFP4", "Q4_K"))
@pytest.mark.parametrize(("inputs", "share", "strips", "ahead"), [(1280, 4, 1, 2), (512, 2, 6, 0), (256, 1, 4, 0)])
def test_a_product_agrees_with_float64(name, inputs, share, strips, ahead, monkeypatch):
    """Warps with two turns and with one, more strips than there are, and one turn in all."""
    settings = importlib.import_module("pallas_kernels.matvec.row_sm90").Settings(share, strips, ahead)
    x, weight = _x(1, inputs), _fragments(name, 64, inputs)
    kernel, row = np.asarray(weight.dequantize(), np.float64), np.asarray(x, np.float64)[0]
    actual = _emulated(monkeypatch, x, [weight], 64, settings, 1)
    assert np.all(np.abs(actual - kernel @ row) <= 2e-7 * (np.abs(kernel) @ np.abs(row)))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["MXFP4", "Q4_K"])
def test_gate_and_up_agree_with_float64(name, apart, monkeypatch):
    settings = importlib.import_module("pallas_kernels.matvec.row_sm90").Settings(1, 6)
    x, whole = _x(1, 512), _fragments(name, 256, 512)
    kernel, row = np.asarray(whole.dequantize(), np.float64), np.asarray(x, np.float64)[0]
    halves = [jax.tree.map(lambda array, n=n: array[2 * n : 2 * n + 2], whole) for n in range(2)]
    actual = _emulated(monkeypatch, x, halves if apart else [whole], 128, settings, 2)
    assert_gated(actual, row, np.split(kernel, 2))
