"""Random blocks of ggml's packed types."""

import numpy as np

from pallas_kernels.formats.ggml import PACKED

HALVES = {"d", "m", "dmin"}
EXACT_SCALES = (2, 252)  # of MXFP4: those with which no value is subnormal or infinite in float32


def random_blocks(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """uint8 [*shape, bytes]: any bytes, but finite half-precision numbers, subnormal, negative and zero among them."""
    rng, packed = np.random.default_rng(seed), PACKED[name]
    blocks, start = rng.integers(0, 256, (*shape, packed.nbytes), dtype=np.uint8), 0
    for field, width in packed.fields.items():
        if field in HALVES:
            magnitudes = rng.choice([0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF], shape)  # zero, both ends, one
            magnitudes = np.where(rng.random(shape) < 0.3, magnitudes, rng.integers(0, 0x7C00, shape))
            signs = rng.integers(0, 2, shape) << 15
            blocks[..., start : start + 2] = (magnitudes | signs).astype("<u2")[..., None].view(np.uint8)
        if field == "e":
            blocks[..., start] = rng.integers(EXACT_SCALES[0], EXACT_SCALES[1] + 1, shape)
        start += width
    return blocks
