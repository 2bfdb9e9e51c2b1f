"""The packed types of ggml against their definitions, value by value in Python's float64.

tests/oracle/test_gguf_oracle.py compares with the gguf package.
"""

import struct
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.ggml import PACKED
from pallas_kernels.formats.ggml.tables import to_mxfp4
from pallas_kernels.formats.mxfp4 import MXFP4
from tests.pallas_kernels.formats.ggml_blocks import random_blocks

NONLINEAR = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def halves(block: bytes, *starts: int) -> list[float]:
    return [struct.unpack_from("<e", block, start)[0] for start in starts]


def nibble(codes: bytes, i: int) -> int:
    """16 bytes hold 32 values: first all low nibbles, then all high ones."""
    return codes[i % 16] >> 4 * (i // 16) & 15


def bit(data: bytes, i: int) -> int:
    return data[i // 8] >> i % 8 & 1


def q4_0(block: bytes, i: int) -> float:
    (d,) = halves(block, 0)
    return d * (nibble(block[2:], i) - 8)


def q4_1(block: bytes, i: int) -> float:
    d, m = halves(block, 0, 2)
    return d * nibble(block[4:], i) + m


def q5_0(block: bytes, i: int) -> float:
    (d,) = halves(block, 0)
    return d * (nibble(block[6:], i) + 16 * bit(block[2:6], i) - 16)


def q5_1(block: bytes, i: int) -> float:
    d, m = halves(block, 0, 2)
    return d * (nibble(block[8:], i) + 16 * bit(block[4:8], i)) + m


def q8_0(block: bytes, i: int) -> float:
    (d,) = halves(block, 0)
    return d * struct.unpack_from("b", block, 2 + i)[0]


def two_bits(data: bytes, i: int) -> int:
    """64 bytes hold 256 values: each half has 128, 32 in bits 0 and 1, 32 in bits 2 and 3, and so on."""
    return data[32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3


def four_bits(data: bytes, i: int) -> int:
    """128 bytes hold 256 values: each quarter has 64, 32 in the low nibbles and 32 in the high ones."""
    return data[32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15


def plane(data: bytes, i: int) -> int:
    """32 bytes hold 256 bits: value i has bit i // 32 of byte i % 32."""
    return data[i % 32] >> i // 32 & 1


def q2_k(block: bytes, i: int) -> float:
    d, dmin = halves(block, 80, 82)
    scale = block[i // 16]
    return d * (scale & 15) * two_bits(block[16:80], i) - dmin * (scale >> 4)


def q3_k(block: bytes, i: int) -> float:
    (d,) = halves(block, 108)
    packed, run = block[96:108], i // 16
    low = packed[run % 8] >> 4 * (run // 8) & 15
    high = packed[8 + run % 4] >> 2 * (run // 4) & 3
    value = two_bits(block[32:96], i) - (0 if plane(block[:32], i) else 4)
    return d * (low + 16 * high - 32) * value


def scale_and_offset(packed: bytes, run: int) -> tuple[int, int]:
    """Six bits each, of Q4_K and Q5_K."""
    if run < 4:
        return packed[run] & 63, packed[run + 4] & 63
    low = packed[run + 4]
    return (low & 15) + 16 * (packed[run - 4] >> 6), (low >> 4) + 16 * (packed[run] >> 6)


def q4_k(block: bytes, i: int) -> float:
    d, dmin = halves(block, 0, 2)
    scale, offset = scale_and_offset(block[4:16], i // 32)
    return d * scale * four_bits(block[16:], i) - dmin * offset


def q5_k(block: bytes, i: int) -> float:
    d, dmin = halves(block, 0, 2)
    scale, offset = scale_and_offset(block[4:16], i // 32)
    return d * scale * (four_bits(block[48:], i) + 16 * plane(block[16:48], i)) - dmin * offset


def q6_k(block: bytes, i: int) -> float:
    (d,) = halves(block, 208)
    half, rest = divmod(i, 128)
    low = block[64 * half + rest % 64] >> 4 * (rest // 64) & 15
    high = two_bits(block[128:192], i)
    return d * struct.unpack_from("b", block, 192 + i // 16)[0] * (low + 16 * high - 32)


def iq4_nl(block: bytes, i: int) -> float:
    (d,) = halves(block, 0)
    return d * NONLINEAR[nibble(block[2:], i)]


def iq4_xs(block: bytes, i: int) -> float:
    (d,) = halves(block, 0)
    run = i // 32
    high = struct.unpack_from("<H", block, 2)[0] >> 2 * run & 3
    low = block[4 + run // 2] >> 4 * (run % 2) & 15
    return d * (low + 16 * high - 32) * NONLINEAR[nibble(block[8 + 16 * run :], i % 32)]


def mxfp4(block: bytes, i: int) -> float:
    return 2.0 ** (block[0] - 127) * E2M1[nibble(block[1:], i)]


DEFINITIONS: dict[str, Callable[[bytes, int], float]] = {
    **{"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0},
    **{"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k},
    **{"IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "MXFP4": mxfp4},
}


def defined(name: str, blocks: np.ndarray) -> np.ndarray:
    size = PACKED[name].size
    values = [
        DEFINITIONS[name](block.tobytes(), i) for block in blocks.reshape(-1, blocks.shape[-1]) for i in range(size)
    ]
    # The float64 numbers are exact, so this rounds once, as a final addition in float32 does.
    return np.array(values).astype(np.float32).reshape(*blocks.shape[:-2], -1)


@pytest.mark.parametrize("name", PACKED)
def test_blocks_are_decoded_as_defined(name):
    blocks = random_blocks(name, (3, 2))
    got = PACKED[name].dequantize(blocks)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    np.testing.assert_array_equal(got, defined(name, blocks))


def test_blocks_on_a_device_are_decoded_as_defined():
    blocks = {name: random_blocks(name, (2, 3)) for name in PACKED}
    got = jax.jit(lambda blocks: {name: PACKED[name].dequantize(each) for name, each in blocks.items()})(blocks)
    for name, each in blocks.items():
        assert got[name].dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(got[name]), defined(name, each), name)


@pytest.mark.parametrize("name", PACKED)
def test_there_may_be_no_blocks(name):
    packed = PACKED[name]
    assert packed.dequantize(np.zeros((2, 0, packed.nbytes), np.uint8)).shape == (2, 0)
    assert packed.dequantize(np.zeros((0, 3, packed.nbytes), np.uint8)).shape == (0, 3 * packed.size)


def test_mxfp4s_scales_at_the_ends():
    """Numbers below float32's normal ones, which XLA takes for zero on a CPU, and the scale that means NaN."""
    blocks = np.zeros((4, 17), np.uint8)
    blocks[:, 0], blocks[:, 1] = [0, 1, 254, 255], 0x01  # value 0 is 0.5
    expected = [2.0**-128, 2.0**-127, 2.0**126, np.nan]
    np.testing.assert_array_equal(PACKED["MXFP4"].dequantize(blocks)[::32], np.float32(expected))
    on_device = np.asarray(jax.jit(PACKED["MXFP4"].dequantize)(blocks))[::32]
    np.testing.assert_allclose(on_device[:2], expected[:2], rtol=0, atol=2.0**-126)
    np.testing.assert_array_equal(on_device[2:], np.float32(expected[2:]))


@pytest.mark.parametrize("repack", [to_mxfp4, jax.jit(to_mxfp4)], ids=["numpy", "jit"])
def test_mxfp4_becomes_our_own_type(repack):
    blocks = random_blocks("MXFP4", (2, 5, 3))
    codes, scales = repack(blocks)
    assert codes.shape == (2, 5, 3, 16) and scales.shape == (2, 5, 3)
    ours = MXFP4.of(np.asarray(codes), np.asarray(scales))
    assert ours.shape == (2, 5, 96)
    np.testing.assert_array_equal(np.asarray(ours.dequantize()), defined("MXFP4", blocks))
    negative_zeros = sum(nibble(block.tobytes()[1:], i) == 8 for block in blocks.reshape(-1, 17) for i in range(32))
    assert (np.signbit(ours.dequantize()) & (np.asarray(ours.dequantize()) == 0)).sum() == negative_zeros > 0
