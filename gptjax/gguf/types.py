"""The types of tensors in GGUF files: their numbers and names, and the bytes that they take.

Source: llama.cpp, `enum ggml_type` in ggml/include/ggml.h, and the `block_*` structures in ggml/src/ggml-common.h.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np

from pallas_kernels.formats.ggml import PACKED

FLOATS: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES: Final[Mapping[int, str]] = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16"},
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0"},
    # llama.cpp has given these up.
    **{4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"},
    **{36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"},
}
_UNREAD: Final = {  # not decoded, but their size is checked
    **{"I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8), "F64": (1, 8)},
    **{"NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18)},
    **{"IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82)},
    **{"IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "TQ1_0": (256, 54), "TQ2_0": (256, 66)},
}
BLOCKS: Final[Mapping[str, tuple[int, int]]] = {  # values and bytes of a block
    **{name: (1, dtype.itemsize) for name, dtype in FLOATS.items()},
    **{name: (packed.size, packed.nbytes) for name, packed in PACKED.items()},
    **_UNREAD,
}
READ: Final = (*FLOATS, *PACKED)
USE_ANOTHER: Final = f"use a file with the types {', '.join(READ)}"
_AT_A_TIME: Final = 1 << 16  # values whose intermediate results stay in the cache: 4 million take up to twice as long


def nbytes(type_name: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor. Raises `KeyError` for an unknown type."""
    size, block_bytes = BLOCKS[type_name]
    return math.prod(shape) // size * block_bytes


def expand(type_name: str, blocks: np.ndarray, out: np.ndarray) -> None:
    """Writes the numbers in a packed type's blocks, uint8 [blocks, bytes], to float32 [blocks * values]."""
    packed = PACKED[type_name]
    step = _AT_A_TIME // packed.size
    for first in range(0, len(blocks), step):
        part = packed.dequantize(blocks[first : first + step])
        out[first * packed.size :][: part.size] = part
