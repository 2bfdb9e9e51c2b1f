"""`formats.mxfp4` against ml_dtypes' decoding, float64 NumPy's rounding and blocks worked out by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.formats.mxfp4 import BLOCK, MXFP4, quantize

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # of codes 0 to 7
FLUSHES = jax.default_backend() == "cpu"  # subnormal numbers
RUNS = [pytest.param(lambda f: f, id="eager"), pytest.param(jax.jit, id="jit")]

properties = settings(deadline=None, max_examples=60, derandomize=True)
any_bytes = hnp.arrays(np.uint8, (3, 2, BLOCK // 2))
exact_scales = hnp.arrays(np.uint8, (3, 2), elements=st.integers(2, 252))


def floats():
    """Multiples of small powers of two, which meet every tie and the saturation, or floats of any size."""
    grid = st.builds(lambda n, e: n * 2.0**e, st.integers(-64, 64), st.integers(-6, -1))
    finite = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True, width=32)
    return st.one_of(hnp.arrays(np.float32, (3, 2 * BLOCK), elements=elements) for elements in (grid, finite))


def decoded(blocks, scales):
    """In float64, by ml_dtypes' types of four and of eight bits."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (elements * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[..., None]).reshape(
            *scales.shape[:-1], -1
        )


def rounded(x):
    """What `quantize` should give, codes and scales apart, by search for the nearest value in float64."""
    x = np.asarray(x).astype(np.float32).astype(np.float64)
    x = np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).reshape(*x.shape[:-1], -1, BLOCK)
    amax = np.abs(x).max(axis=-1)
    exponent = np.where(amax == 0, -1000, np.frexp(amax)[1] - 1)  # frexp: m · 2^e with m in [.5, 1)
    scales = np.clip(exponent - 2 + 127, 2, 252).astype(np.uint8)
    distances = np.abs(np.ldexp(np.abs(x), 127 - scales[..., None].astype(int))[..., None] - VALUES)
    ties = distances == distances.min(axis=-1, keepdims=True)
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # of two neighbours one is even
    codes = even_first[np.argmax(ties[..., even_first], axis=-1)]
    return (codes + 8 * np.signbit(x)).astype(np.uint8), scales


def same_bits(got, want):
    """Equal, with the sign of zeros and the place of NaNs."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])


def made(shape, seed=0):
    """A tensor of random codes, with scales like a checkpoint's."""
    *rows, n = shape
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*rows, n // BLOCK, BLOCK // 2), dtype=np.uint8)
    return MXFP4.of(blocks, rng.integers(110, 130, (*rows, n // BLOCK), dtype=np.uint8))


def on_device(packed):
    return jax.tree.map(jnp.asarray, packed)


# --- dequantize


def test_a_block_worked_out_by_hand():
    # The low nibble comes first: byte 0x10 is code 0 (0), then code 1 (0.5). Eight bytes count 0 to 15; then the same
    # with the nibbles swapped, so that neighbours change places. Scale 130 is 2^(130 − 127) = 8.
    blocks = bytes.fromhex("1032547698badcfe 0123456789abcdef")
    want = [0, 4, 8, 12, 16, 24, 32, 48, -0.0, -4, -8, -12, -16, -24, -32, -48]
    want += [4, 0, 12, 8, 24, 16, 48, 32, -4, -0.0, -12, -8, -24, -16, -48, -32]
    got = MXFP4.of(np.frombuffer(blocks, np.uint8)[None], np.uint8([130])).dequantize()
    same_bits(got, np.float32(want))


def test_scales_of_gpt_oss_by_hand():
    # 2^(121 − 127) = 1/64 and 2^(124 − 127) = 1/8. Byte 0x7f is −6, then 6; 0x91 is 0.5, then −0.5.
    blocks = np.uint8([[0x7F] * 16, [0x91] * 16])
    got = MXFP4.of(blocks, np.uint8([121, 124])).dequantize()
    same_bits(got, np.float32([-0.09375, 0.09375] * 16 + [0.0625, -0.0625] * 16))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_all_codes_and_scales_are_exact(run, dtype):
    blocks = np.frombuffer(bytes.fromhex("1032547698badcfe" * 2), np.uint8)
    scales = np.arange(2, 253, dtype=np.uint8)[:, None]
    packed = MXFP4.of(np.tile(blocks, (len(scales), 1, 1)), scales)
    with np.errstate(over="ignore"):  # float16 goes no further than 65504
        want = decoded(packed.blocks, packed.scales).astype(dtype)
    if dtype == jnp.float32:
        assert np.isfinite(want).all() and (want != 0).sum() == want.size * 14 / 16
    same_bits(run(lambda p: p.dequantize(dtype))(packed), want)


def test_scales_at_the_ends():
    scales = np.uint8([[0], [1], [253], [254]])
    blocks = np.tile(np.frombuffer(bytes.fromhex("1032547698badcfe" * 2), np.uint8), (4, 1, 1))
    zero, one, *high = np.asarray(MXFP4.of(blocks, scales).dequantize())
    same_bits(zero, np.copysign(np.float32(0), decoded(blocks, scales)[0].astype(np.float32)))
    exact = decoded(blocks, scales)[1].astype(np.float32)
    subnormal = np.abs(exact) == 2.0**-127
    same_bits(one, np.where(subnormal & FLUSHES, np.copysign(np.float32(0), exact), exact))
    with np.errstate(over="ignore"):
        same_bits(np.stack(high), decoded(blocks, scales)[2:].astype(np.float32))


def test_a_nan_scale_makes_its_block_nan_and_no_other():
    packed = made((2, 3 * BLOCK))
    packed.scales[1, 1] = 255
    got = np.asarray(packed.dequantize())
    assert np.isnan(got[1, BLOCK : 2 * BLOCK]).all() and np.isnan(got).sum() == BLOCK


@properties
@given(any_bytes, exact_scales)
def test_dequantize_is_ml_dtypes_decoding(blocks, scales):
    same_bits(MXFP4(blocks, scales).dequantize(), decoded(blocks, scales).astype(np.float32))


# --- quantize


def test_rounding_worked_out_by_hand():
    # The largest magnitude is 7, floor(log2(7)) = 2 and 2 − 2 = 0: the scale is 127, values stay as they are.
    x = [7, 6.5, 5, 5.0625, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, 0.2, 0.26, 4.9, 3.4, 0.0, -0.0]
    # Saturated:   7 → 6 and 6.5 → 6 (code 7)
    # Ties, even:  5 → 4 (6), 3.5 → 4 (6), 2.5 → 2 (4), 1.75 → 2 (4), 1.25 → 1 (2), 0.75 → 1 (2), 0.25 → 0 (0)
    # Nearest:     5.0625 → 6 (7), 0.2 → 0 (0), 0.26 → 0.5 (1), 4.9 → 4 (6), 3.4 → 3 (5); 0 (0) and −0 (8)
    # With the sign codes are 8 more, and of two neighbours the first is the low nibble: 7, 7 → 0x77; 6, 7 → 0x76.
    positive = "77 76 46 24 02 10 56 80"
    negative = "ff fe ce ac 8a 98 de 08"
    packed = quantize(np.float32([*x, *(-v for v in x)]))
    assert bytes(np.asarray(packed.blocks)[0]) == bytes.fromhex(positive + negative)
    assert packed.scales.tolist() == [127]


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (1.0, 125),  # 2^0: 0 − 2 + 127
        (np.nextafter(np.float32(1), np.float32(0)), 124),  # where log2 in float32 gives 0
        (6.0, 127),
        (0.0, 2),
        (2.0**-126, 2),  # float32's smallest normal number, at code 1: 0.5 · 2^(2 − 127)
        (1.5 * 2.0**-127, 2),  # subnormal, so 0 although 0.5 · 2^(2 − 127) is nearer
        (float(np.finfo(np.float32).max), 252),
    ],
)
@pytest.mark.parametrize("run", RUNS)
def test_shared_exponents(run, largest, scale):
    x = np.zeros(BLOCK, np.float32)
    x[5] = -largest
    packed = run(quantize)(x)
    assert packed.scales.tolist() == [scale]
    codes, _ = rounded(x)
    assert int(packed.blocks[0, 2]) == int(codes[0, 5]) << 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, np.float64])
def test_every_float_rounds_as_float64_does(dtype):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 7, 3 * BLOCK)) * np.exp2(rng.integers(-24, 5, (5, 7, 1)))
    x = x.astype(dtype)
    codes, scales = rounded(x)
    packed = quantize(x)
    np.testing.assert_array_equal(packed.scales, scales)
    np.testing.assert_array_equal(packed.blocks, codes[..., 0::2] | codes[..., 1::2] << 4)


@properties
@given(floats())
def test_quantize_is_float64_rounding(x):
    packed = quantize(x)
    codes, scales = rounded(x)
    np.testing.assert_array_equal(packed.scales, scales)
    np.testing.assert_array_equal(packed.blocks, codes[..., 0::2] | codes[..., 1::2] << 4)


@properties
@given(floats())
def test_elements_round_as_ml_dtypes_rounds(x):
    packed = quantize(x)
    power = np.exp2(np.asarray(packed.scales).repeat(BLOCK, axis=-1).astype(np.float64) - 127)
    normal = np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)
    elements = (normal / power).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(decoded(np.asarray(packed.blocks), np.asarray(packed.scales)), elements * power)


@properties
@given(floats())
def test_the_error_is_bounded_block_by_block(x):
    # Between 4 and 6 values are 2 apart and 5 loses 1/5; above 6 they saturate, and just below 8 loses 1/4.
    error = np.abs(np.asarray(quantize(x).dequantize(), np.float64) - x).reshape(-1, BLOCK)
    largest = np.abs(x.astype(np.float64)).reshape(-1, BLOCK).max(axis=-1, keepdims=True)
    assert (error <= np.maximum(largest / 4, 2.0**-126)).all()


@properties
@given(any_bytes, exact_scales)
def test_what_was_quantized_stays(blocks, scales):
    values = MXFP4(blocks, scales).dequantize()
    once = quantize(values)
    same_bits(once.dequantize(), values)
    twice = quantize(once.dequantize())
    np.testing.assert_array_equal(twice.blocks, once.blocks)
    np.testing.assert_array_equal(twice.scales, once.scales)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_no_numbers_at_all(shape):
    assert quantize(np.zeros(shape, np.float32)).dequantize().shape == shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(bad):
    x = np.ones((2, 2 * BLOCK), np.float32)
    x[1, 3] = bad
    with pytest.raises(ValueError, match="no NaN and no infinity"):
        quantize(x)
    packed = jax.jit(quantize)(x)  # which cannot look: the block is NaN
    assert packed.scales.tolist() == [[125, 125], [255, 125]]
    assert np.isnan(packed.dequantize()).sum() == BLOCK


@pytest.mark.parametrize("shape", [(), (33,), (2, 31), (32, 5)])
def test_a_last_axis_without_whole_blocks_is_refused(shape):
    with pytest.raises(ValueError, match=r"multiple of 32.*pad"):
        quantize(np.zeros(shape, np.float32))


def test_integers_are_refused():
    with pytest.raises(ValueError, match="int32"):
        quantize(np.zeros(BLOCK, np.int32))


# --- the pytree


def test_shapes_and_sizes_are_those_of_the_numbers():
    packed = made((4, 6, 96))
    abstract = jax.eval_shape(quantize, jax.ShapeDtypeStruct((4, 6, 96), jnp.bfloat16))
    for tensor in (packed, abstract, on_device(packed)):
        assert (tensor.shape, tensor.ndim, tensor.size) == ((4, 6, 96), 3, 4 * 6 * 96)
        assert tensor.nbytes * 8 == tensor.size * 4.25
    assert packed.nbytes == packed.blocks.nbytes + packed.scales.nbytes
    assert isinstance(abstract, MXFP4) and abstract.blocks.dtype == jnp.uint8


def test_an_expert_matrix_of_gpt_oss_120b_without_memory():
    gate_up = MXFP4.of(
        jax.ShapeDtypeStruct((128, 5760, 90, 16), jnp.uint8), jax.ShapeDtypeStruct((128, 5760, 90), jnp.uint8)
    )
    assert gate_up.shape == (128, 5760, 2880)
    assert gate_up.nbytes == 128 * 5760 * 2880 * 17 // 32
    assert jax.eval_shape(lambda p: p.dequantize(jnp.bfloat16), gate_up).shape == gate_up.shape


def test_leaves_have_names():
    leaves, structure = jax.tree_util.tree_flatten_with_path({"w": made((32,))})
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == ["['w'].blocks", "['w'].scales"]
    boxed = structure.unflatten(["a box", None])["w"]  # anything may lie in the fields
    assert (boxed.blocks, boxed.scales) == ("a box", None)


def test_jit_and_vmap():
    packed = made((3, 5, 64))
    want = packed.dequantize()
    same_bits(jax.vmap(lambda p: p.dequantize())(packed), want)
    again = jax.jit(jax.vmap(lambda p: quantize(p.dequantize())))(packed)
    same_bits(again.dequantize(), want)


@pytest.mark.parametrize(
    "index",
    [
        1,
        slice(1, 3),
        (2, 4),
        (slice(None), 3),
        (None, 1),
        np.array([3, 0, 3]),
        (np.array([[1], [2]]), np.array([0, 4])),
        np.array([True, False, True, True]),
        np.zeros((0, 2), int),
        np.eye(4, 5, dtype=bool),
    ],
)
@pytest.mark.parametrize("convert", [lambda p: p, on_device])
def test_indexing_takes_whole_rows(index, convert):
    packed = made((4, 5, 64))
    taken = convert(packed)[index]
    assert isinstance(taken, MXFP4)
    same_bits(taken.dequantize(), np.asarray(packed.dequantize())[index])


def test_experts_are_gathered_under_jit():
    packed = on_device(made((8, 6, 64)))
    ids = jnp.array([[5, 0], [7, 5]])
    got = jax.jit(lambda p, i: p[i].dequantize())(packed, ids)
    same_bits(got, np.asarray(packed.dequantize())[np.asarray(ids)])


@pytest.mark.parametrize(
    "index", [(0, 0, 0), ..., (..., 0), (slice(None),) * 3, np.ones((4, 5, 64), bool), (0, np.ones((5, 64), bool))]
)
def test_blocks_are_not_cut(index):
    with pytest.raises(IndexError, match=r"first 2 axes.*dequantize\(\)"):
        made((4, 5, 64))[index]


def test_iteration_is_refused_and_does_not_run_for_ever():
    with pytest.raises(TypeError, match="not iterable"):
        iter(on_device(made((2, 32))))


def _u8(*shape):
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("blocks", "scales", "fault"),
    [
        (np.zeros((2, 16), np.int8), _u8(2), "blocks must be uint8, found int8"),
        (_u8(2, 16), np.zeros(2, np.float32), "scales must be uint8, found float32"),
        (_u8(2, 32), _u8(2), r"found \(2, 32\) and \(2,\)"),
        (_u8(3, 16), _u8(2), r"found \(3, 16\) and \(2,\)"),
        (_u8(2, 16), _u8(2, 1), r"found \(2, 16\) and \(2, 1\)"),
        (_u8(16), _u8(), r"found \(16,\) and \(\)"),
        (_u8(2, 3, 16), np.uint8([[1, 2, 3], [4, 255, 255]]), r"2 of 6 .* NaN, the first at \(1, 1\)"),
    ],
)
def test_what_is_no_mxfp4_is_refused(blocks, scales, fault):
    with pytest.raises(ValueError, match=fault):
        MXFP4.of(blocks, scales)
