"""What `/health` says of a model's weights and tokenizer, in the words of llama.cpp and of tools for it."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from gptjax.checkpoints.checkpoint import Checkpoint
from gptjax.language_model import LanguageModel
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import MXFP4

_FLOATS: Final[Mapping[str, str]] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# `general.file_type` of a GGUF file. Source: llama.h, `enum llama_ftype`.
FILE_TYPES: Final[Mapping[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    21: "Q2_K_S",
    25: "IQ4_NL",
    30: "IQ4_XS",
    32: "BF16",
    38: "MXFP4",
}


def quant_kind(lm: LanguageModel, checkpoint: Checkpoint | None = None) -> str:
    """The type of the weights: what a GGUF file calls itself, else MXFP4 or the most frequent type in memory."""
    if checkpoint is not None and checkpoint.gguf is not None:
        declared: Any = checkpoint.gguf.metadata.get("general.file_type")
        if isinstance(declared, int) and declared in FILE_TYPES:
            return FILE_TYPES[declared]
    leaves = jax.tree.leaves(lm.params, is_leaf=is_packed)
    if any(isinstance(leaf, MXFP4 | MXFP4Fragments) for leaf in leaves):
        return "MXFP4"
    sizes: Counter[str] = Counter()
    for leaf in leaves:
        sizes[leaf.type if is_packed(leaf) else _FLOATS[jnp.dtype(leaf.dtype).name]] += leaf.size
    return sizes.most_common(1)[0][0]


def tokenizer_kind(checkpoint: Checkpoint, given: str | os.PathLike[str] | None) -> str:
    """ "gguf-bpe" if the tokenizer is a GGUF file's, else "hf-json".

    Args:
      given: where the tokenizer was read from instead; None: from the checkpoint.
    """
    is_gguf = checkpoint.gguf is not None if given is None else os.fspath(given).endswith(".gguf")
    return "gguf-bpe" if is_gguf else "hf-json"
