"""Products with packed matrices: jnp's here, the Mosaic kernel lowered for CUDA, and run on a Hopper GPU."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.ggml.fragments import PARTS, QuantizedFragments
from pallas_kernels.formats.ggml.weight import Quantized
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.matvec import Fragments, packed_matvec, repacked
from tests.pallas_kernels.formats.ggml_blocks import random_blocks
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic
from tests.thinned import thorough

TYPES = ["MXFP4", *PARTS]
BF16 = float(jnp.finfo(jnp.bfloat16).eps)


def _packed(name: str, outputs: int, inputs: int, seed: int = 0) -> MXFP4 | Quantized:
    """Random codes and scales."""
    if name != "MXFP4":
        shape = Quantized.abstract((outputs, inputs), name).blocks.shape
        return Quantized(jnp.asarray(random_blocks(name, shape[:-1], seed)), name)
    rng = np.random.default_rng(seed)
    blocks, scales = (
        rng.integers(0, 256, (outputs, inputs // 32, 16), np.uint8),
        rng.integers(115, 125, (outputs, inputs // 32), np.uint8),
    )
    return MXFP4(jnp.asarray(blocks), jnp.asarray(scales))


def _fragments(name: str, outputs: int, inputs: int, seed: int = 0) -> Fragments:
    packed = _packed(name, outputs, inputs, seed)
    return MXFP4Fragments.of(packed) if isinstance(packed, MXFP4) else QuantizedFragments.of(packed)


def _x(T: int, inputs: int) -> jax.Array:
    return jax.random.normal(jax.random.key(T), (T, inputs), jnp.bfloat16)


def _agrees(actual, x, parts, bias, *, rounded: bool):
    """With float64. If numbers are `rounded`, each product may be off by bfloat16's precision."""
    kernel = np.concatenate([np.asarray(part.dequantize(), np.float64) for part in parts])
    exact = np.asarray(x, np.float64) @ kernel.T + np.asarray(bias, np.float64)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(kernel).T
    assert np.all(np.abs(np.asarray(actual) - exact) <= (BF16 if rounded else 2e-6) * size + 1e-30)


@pytest.mark.parametrize("name", ["MXFP4", "Q4_K", "Q6_K"])
def test_jnp_agrees_with_float64(name):
    parts, bias = [_fragments(name, 128, 256), _fragments("Q8_0", 64, 256, seed=1)], jnp.arange(192.0)
    for T in (1, 5):
        x = _x(T, 256)
        _agrees(packed_matvec(x, parts, bias, implementation="xla").total(), x, parts, bias, rounded=True)


def test_repacking_keeps_numbers_whatever_is_done_at_a_time(monkeypatch):
    module = importlib.import_module("pallas_kernels.matvec.api")
    monkeypatch.setattr(dispatch, "wanted", lambda implementation: dispatch.MOSAIC)
    for numbers, name in ((64 * 256, "MXFP4"), (2 * 64 * 512, "Q5_K")):
        monkeypatch.setattr(module, "_AT_ONCE", numbers)
        packed = _packed(name, 384, 512)
        module._repack.clear_cache()
        made = repacked(packed)
        assert isinstance(made, Fragments)
        np.testing.assert_array_equal(made.dequantize(), packed.dequantize())
    assert isinstance(repacked(_packed("Q4_0", 96, 64)), Quantized)
    assert isinstance(repacked(_packed("MXFP4", 64, 96)), MXFP4)
    monkeypatch.undo()
    packed = _packed("Q4_0", 64, 64)
    if dispatch.preferred() != dispatch.MOSAIC:
        assert repacked(packed) is packed


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="up to 64 rows"):
        packed_matvec(_x(65, 64), [_fragments("Q4_0", 64, 64)])


@needs_mosaic
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("T", "inputs", "outputs"), [(1, 256, 64), thorough(9, 1280, 192), thorough(64, 512, 128)])
def test_products_lower(name, T, inputs, outputs):
    product = importlib.import_module("pallas_kernels.matvec.packed_sm90").product
    weight = jax.eval_shape(lambda: _fragments(name, outputs, inputs))
    text = lowered(lambda x, *parts: product(x, parts).total(), jax.eval_shape(lambda: _x(T, inputs)), weight, weight)
    assert text.count("call @_parts") == 2 and "packed_matvec" in text


@needs_mosaic
def test_splits_fill_the_device_and_divide_turns():
    splits_of = importlib.import_module("pallas_kernels.matvec.packed_sm90").splits_of
    for outputs, inputs in [(4096, 4096), (4096, 14336), (6144, 4096), (128256, 4096), (2880, 4096), (5120, 2880)]:
        splits = splits_of(outputs, inputs)
        assert inputs // 64 % splits == 0
        assert inputs % 256 or inputs // 256 % splits == 0
        assert splits == 1 or 256 <= splits * outputs // 64 <= 924


@needs_hopper
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("T", "inputs", "outputs"), [(1, 4096, 1024), (8, 768, 64), (13, 2816, 192), (64, 1280, 4096)])
def test_products_agree_with_float64(name, T, inputs, outputs):
    parts, bias = [_fragments(name, outputs, inputs), _fragments("Q8_0", 64, inputs, seed=1)], jnp.ones(outputs + 64)
    x = _x(T, inputs)
    actual = packed_matvec(x, parts, bias, implementation="mosaic")
    _agrees(actual.total(), x, parts, bias, rounded=False)
    alone = packed_matvec(x[:1], parts, bias, implementation="mosaic")
    np.testing.assert_array_equal(actual.parts_JAO[:, :1], alone.parts_JAO)
