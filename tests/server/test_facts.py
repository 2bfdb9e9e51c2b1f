"""What /health says of weights and tokenizers."""

import types

import jax
import jax.numpy as jnp
import pytest

import gptjax
from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.server.worker.facts import FILE_TYPES, quant_kind, tokenizer_kind
from pallas_kernels.formats.ggml.weight import Quantized


def _given(*leaves):
    return types.SimpleNamespace(params=dict(enumerate(leaves)))


def _file(declared):
    metadata = {} if declared is None else {"general.file_type": declared}
    return types.SimpleNamespace(gguf=types.SimpleNamespace(metadata=metadata))


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("gpt2-tales", "float32", "F32"),
        ("gpt2-tales", "bfloat16", "BF16"),
        ("gpt2-tales", "float16", "F16"),
        ("gpt-oss-tales", "bfloat16", "MXFP4"),
    ],
)
def test_weights_of_a_directory(name, dtype, kind):
    checkpoint = open_checkpoint(name)
    assert quant_kind(gptjax.load(name, dtype=dtype), checkpoint) == kind
    assert tokenizer_kind(checkpoint, None) == "hf-json"
    assert tokenizer_kind(checkpoint, "other.gguf") == "gguf-bpe"


def test_a_gguf_file_is_what_it_calls_itself():
    lm = _given(jnp.zeros((4, 4)))
    assert quant_kind(lm, _file(15)) == "Q4_K_M"
    assert tokenizer_kind(_file(15), None) == "gguf-bpe"
    assert tokenizer_kind(_file(15), "a/directory") == "hf-json"
    for unknown in (None, 1024, "15", 15.0, [15]):
        assert quant_kind(lm, _file(unknown)) == "F32"


def test_without_a_name_it_is_the_most_frequent_type():
    packed = [
        Quantized.random(jax.random.key(0), shape, kind) for shape, kind in (((8, 256), "Q4_K"), ((4, 256), "Q6_K"))
    ]
    assert quant_kind(_given(*packed, jnp.zeros(256, jnp.bfloat16))) == "Q4_K"
    assert quant_kind(_given(*packed, jnp.zeros((64, 256), jnp.bfloat16))) == "BF16"


@pytest.mark.oracle
def test_names_are_llama_cpps():
    gguf = pytest.importorskip("gguf")
    ours = {number: "MXFP4_MOE" if name == "MXFP4" else name for number, name in FILE_TYPES.items()}
    theirs = {each.value: each.name.removeprefix("MOSTLY_").removeprefix("ALL_") for each in gguf.LlamaFileType}
    assert ours.items() <= theirs.items()
