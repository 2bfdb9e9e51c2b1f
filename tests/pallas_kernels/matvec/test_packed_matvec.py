"""Products with packed matrices: jnp's here, the Mosaic kernel lowered for CUDA, and run on a Hopper GPU."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.add_norm import add_norm
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.ggml.fragments import PARTS, QuantizedFragments
from pallas_kernels.formats.ggml.weight import Quantized
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.matvec import (
    Fragments,
    RowNorm,
    normed_gated,
    normed_matvec,
    packed_gated,
    packed_matvec,
    repacked,
    takes_gated,
    takes_normed,
    takes_normed_gated,
)
from pallas_kernels.partial_sum import PartialSum
from tests.oracles import add_norm_numpy
from tests.pallas_kernels.formats.ggml_blocks import random_blocks
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic
from tests.thinned import thorough

TYPES = ["MXFP4", *PARTS]
BF16 = float(jnp.finfo(jnp.bfloat16).eps)
EPSILON = 1e-6
# Of what `to_norm` makes.
WHAT = ["a term", "nothing", "a bias", "float32", "many sizes", "a large strip", "NaN", "large"]


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
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(kernel).T + np.abs(np.asarray(bias, np.float64))
    assert np.all(np.abs(np.asarray(actual) - exact) <= (BF16 if rounded else 2e-6) * size + 1e-30)


def assert_gated(actual, row, kernels):
    """That `actual` is silu(gate) · up, of a row and float64 kernels [F, I].

    Gate and up are off by a product's error, and rounded to bfloat16; so is the result. |silu'| is at most 1.1.
    """
    gate, up = (kernel @ row for kernel in kernels)
    gate_off, up_off = (2e-6 * np.abs(kernel) @ np.abs(row) + BF16 / 2 * np.abs(kernel @ row) for kernel in kernels)
    with np.errstate(over="ignore"):
        silu = gate / (1 + np.exp(-gate))
    off = 1.1 * gate_off * (np.abs(up) + up_off) + np.abs(silu) * up_off
    off += BF16 / 2 * (np.abs(silu * up) + off) + 1e-30
    assert np.all(np.abs(np.asarray(actual, np.float64) - silu * up) <= off)


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
    alone = T == 1 and PARTS[name].run == 32 if name in PARTS else T == 1
    assert text.count("call @_row" if alone else "call @_parts") == 2
    assert ("packed_row" if alone else "packed_matvec") in text


def to_norm(inputs: int, what: str = "a term") -> RowNorm:
    """A row and what is added to it, of a residual [1, 1, D]."""
    case = add_norm_numpy.Case(1, inputs, E=1 if what == "a bias" else 0)
    x, terms, scale, _ = add_norm_numpy.operands(case, jnp.bfloat16)
    if what == "nothing":
        terms = None
    elif what == "float32":
        scale = scale.astype(jnp.float32) + 1e-3
        terms = PartialSum(terms.parts_JAO, bias_EO=jnp.ones((1, inputs)) / 3)
    elif what == "NaN":
        x = x.at[0, inputs // 2].set(jnp.nan)
    elif what in ("many sizes", "a large strip"):  # whose squares are not added exactly
        exponents = np.random.default_rng(inputs).uniform(-6, 6, inputs)
        exponents[128:] -= 12 * (what == "a large strip")
        x, terms = x * jnp.exp2(exponents).astype(x.dtype), None
    elif what == "large":
        terms = PartialSum(3e38 * terms.parts_JAO)  # squares are infinite, and some sums too
    return RowNorm(x[None], terms, scale, EPSILON)


@needs_mosaic
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("name", "inputs"), [("MXFP4", 3584), ("Q4_K", 4096), thorough("Q5_K", 768)])
def test_products_that_norm_lower(name, inputs, gated):
    module = importlib.import_module("pallas_kernels.matvec.row_sm90")
    function = module.normed_gated if gated else module.normed_product
    norm, weight = jax.eval_shape(lambda: (to_norm(inputs), _fragments(name, 4608, inputs)))
    text = lowered(lambda norm, weight: function(norm, [weight]), norm, weight)
    assert text.count("@mosaic_gpu") == 1 and "packed_row" in text and "add_norm" not in text


@needs_mosaic
def test_which_norms_are_taken_into_products(monkeypatch):
    monkeypatch.setattr(dispatch, "wanted", lambda implementation: dispatch.MOSAIC)

    def takes(norm: RowNorm, outputs: int = 6144, *, parts: int = 1, gated: bool = False) -> bool:
        weight = jax.eval_shape(lambda: _fragments("Q4_K", outputs // parts, norm.x.shape[-1]))
        return (takes_normed_gated if gated else takes_normed)(norm, [weight] * parts)

    for what in ("a term", "nothing", "a bias", "float32"):
        assert takes(to_norm(4096, what))
        assert takes(to_norm(4096, what), 28672, gated=True)
    assert takes(to_norm(3584), 4608) and takes(to_norm(3584), 37888, gated=True)  # Qwen2.5-7B
    assert takes(to_norm(8192), 10240)  # Llama 70B
    assert not takes(to_norm(8192), 57344, gated=True) and not takes(to_norm(4096), 128256)  # too many blocks
    assert not takes(to_norm(4096), parts=2)
    assert takes(to_norm(4096), 28672, parts=2, gated=True)
    norm = to_norm(4096)
    twice = PartialSum(jnp.zeros((2, 1, 4096)))
    rows = PartialSum(jnp.zeros((1, 1, 4096)), rows_TX=jnp.zeros((1, 1), jnp.int32))
    for terms in (twice, rows):
        assert not takes(dataclasses.replace(norm, terms=terms))
    assert not takes(dataclasses.replace(norm, x=jnp.zeros((2, 1, 4096), jnp.bfloat16)))
    assert not takes(dataclasses.replace(norm, x=jnp.zeros((1, 1, 4096))))
    assert not takes(dataclasses.replace(norm, scale_D=jnp.zeros(4096, jnp.float16)))
    monkeypatch.setattr(dispatch, "wanted", lambda implementation: dispatch.XLA)
    assert not takes(norm) and not takes(norm, 28672, gated=True)


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
@pytest.mark.parametrize(
    ("T", "inputs", "outputs"),
    [(1, 4096, 1024), (1, 2816, 192), (1, 256, 68608), (2, 768, 64), (13, 2816, 192), (64, 1280, 4096)],
)
def test_products_agree_with_float64(name, T, inputs, outputs):
    parts, bias = [_fragments(name, outputs, inputs), _fragments("Q8_0", 64, inputs, seed=1)], jnp.ones(outputs + 64)
    x = _x(T, inputs)
    actual = packed_matvec(x, parts, bias, implementation="mosaic")
    _agrees(actual.total(), x, parts, bias, rounded=False)
    others = packed_matvec(jnp.full_like(x, jnp.nan).at[0].set(x[0]), parts, bias, implementation="mosaic")
    np.testing.assert_array_equal(actual.parts_JAO[:, :1], others.parts_JAO[:, :1])


@needs_hopper
@pytest.mark.parametrize("name", ["MXFP4", "Q4_0", "Q4_K", "Q5_K", "Q8_0"])
@pytest.mark.parametrize("apart", [False, True])
def test_gate_and_up_agree_with_float64(name, apart):
    F, inputs = 960, 1280
    x = _x(1, inputs)
    parts = [_fragments(name, F, inputs), _fragments(name, F, inputs, seed=1)]
    kernels = [np.asarray(part.dequantize(), np.float64) for part in parts]
    if not apart:
        packed = [_packed(name, F, inputs, seed) for seed in range(2)]
        whole = jax.tree.map(lambda *halves: jnp.concatenate(halves), *packed)
        parts = [MXFP4Fragments.of(whole) if isinstance(whole, MXFP4) else QuantizedFragments.of(whole)]
    assert takes_gated(x, parts)
    assert not takes_gated(_x(2, inputs), parts)
    assert_gated(packed_gated(x, parts)[0], np.asarray(x, np.float64)[0], kernels)


@needs_hopper
@pytest.mark.parametrize("name", ["MXFP4", "Q4_K"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "F", "what"),
    [
        *((256, 64, 64, what) for what in WHAT),
        (3584, 4608, 18944, "a term"),
        (4096, 6144, 14336, "a term"),
        (4096, 6144, 14336, "nothing"),
        (8192, 10240, 1024, "a bias"),
    ],
)
def test_norms_in_products_have_the_bits_of_norms_before_them(name, inputs, outputs, F, what):
    norm, bias = to_norm(inputs, what), jnp.arange(outputs, dtype=jnp.bfloat16)
    weight, gate_up = _fragments(name, outputs, inputs), _fragments(name, 2 * F, inputs, seed=1)
    assert takes_normed(norm, [weight]) and takes_normed_gated(norm, [gate_up])
    total, normed = add_norm(
        norm.x[0], norm.terms, norm.scale_D, epsilon=EPSILON, center=False, implementation="mosaic"
    )
    expected = packed_matvec(normed, [weight], bias).total(), packed_gated(normed, [gate_up])
    product, activated = normed_matvec(norm, [weight], bias), normed_gated(norm, [gate_up])
    for (sum_, _), like in ((product, norm.x), (activated, norm.x)):
        assert sum_.shape == like.shape and _bits(sum_) == _bits(total)
    assert _bits(product[1].total()) == _bits(expected[0])
    assert _bits(activated[1]) == _bits(expected[1])
    if what not in ("NaN", "large"):
        row = add_norm_numpy.norm(total, norm.scale_D, None, epsilon=EPSILON, center=False)
        np.testing.assert_allclose(np.asarray(normed, np.float64), row, rtol=BF16, atol=1e-5)
        _agrees(product[1].total(), normed, [weight], bias, rounded=False)


def _bits(array: jax.Array) -> bytes:
    return np.asarray(array).tobytes()


@needs_mosaic
def test_rows_are_spread_over_one_block_a_multiprocessor():
    settings_of = importlib.import_module("pallas_kernels.matvec.row_sm90").settings_of
    for outputs, inputs, matrices in [
        (4096, 4096, 1),
        (6144, 4096, 1),
        (14336, 4096, 2),
        (4096, 14336, 1),
        (3584, 18944, 1),
        (18944, 3584, 2),
        (64, 256, 1),
    ]:
        settings = settings_of(outputs, inputs, matrices)
        warps = settings.share * settings.strips * matrices
        assert warps in range(4, 21, 4)
        assert 1 <= settings.share <= inputs // 256
        assert settings.strips * 16 * 132 * (2 if warps <= 8 else 1) >= outputs
    assert settings_of(128256, 4096).strips == 4
