"""The packed types of ggml, llama.cpp's library: blocks of small integers that share half-precision scales.

Each type is a `Packed`: what a block's bytes are, and how they become numbers. The same code decodes NumPy's arrays and
JAX's, inside `jax.jit` too.

Source: llama.cpp, ggml/src/ggml-common.h (layouts) and ggml/src/ggml-quants.c (`dequantize_row_*`).
"""

from collections.abc import Mapping
from typing import Final

from pallas_kernels.formats.ggml import blocks_of_32, k_quants, tables
from pallas_kernels.formats.ggml.packed import Packed as Packed

PACKED: Final[Mapping[str, Packed]] = {
    "Q4_0": blocks_of_32.Q4_0,
    "Q4_1": blocks_of_32.Q4_1,
    "Q5_0": blocks_of_32.Q5_0,
    "Q5_1": blocks_of_32.Q5_1,
    "Q8_0": blocks_of_32.Q8_0,
    "Q2_K": k_quants.Q2_K,
    "Q3_K": k_quants.Q3_K,
    "Q4_K": k_quants.Q4_K,
    "Q5_K": k_quants.Q5_K,
    "Q6_K": k_quants.Q6_K,
    "IQ4_NL": tables.IQ4_NL,
    "IQ4_XS": tables.IQ4_XS,
    "MXFP4": tables.MXFP4,
}
