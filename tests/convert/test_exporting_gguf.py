"""`convert.export` of GGUF files: Hugging Face's tensors, settings and tokenizer."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import convert
from gptjax.checkpoints.checkpoint import open_path
from gptjax.config import read_config
from gptjax.errors import CheckpointError
from tests.convert import made
from tests.convert.exporting_material import WAYS, assert_same, exported, tensors_of
from tests.gguf import made as made_gguf
from tests.oracles import gguf_from_hf, gpt2_random, gpt_oss_random, llama_random


@WAYS
@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "llama3", "qwen3"])
def test_a_gguf_file_becomes_what_it_was_made_from(tmp_path, by, kind):
    """Rows back in order, gate and up together, nibbles in pairs: each tensor has its bits again."""
    if kind == "gpt2":
        config, tensors = gpt2_random.checkpoint(4)
    elif kind == "gpt_oss":
        config, tensors, _ = gpt_oss_random.checkpoint(5)
    else:
        config, tensors = llama_random.checkpoint(3, **llama_random.VARIANTS[kind])
    source = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors)
    dst = exported(tmp_path, source, by)
    prefix = "transformer." if kind == "gpt2" else ""
    assert_same(tensors_of(dst), {f"{prefix}{name}": array for name, array in tensors.items()})
    assert read_config(dst) == open_path(source).config


Q4_0, Q8_0 = gguf_from_hf.Q4_0, gguf_from_hf.Q8_0
PACKED = {  # which of a file's tensors are packed, and what is said about it
    "one type": ({"attn_output.weight": Q8_0, "ffn_down.weight": Q8_0, "token_embd.weight": Q8_0}, "Q8_0"),
    "parts of one type": ({f"attn_{part}.weight": Q4_0 for part in "qkv"} | {"ffn_gate.weight": Q4_0}, "Q4_0"),
    "parts of two": ({"attn_q.weight": Q4_0, "attn_k.weight": Q4_0, "attn_v.weight": Q8_0}, "Q4_0, Q8_0"),
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_types_are_expanded(tmp_path, kind, dtype):
    """By way of a converted directory, where they stay packed, and directly, where the file's reader expands them."""
    types, named = PACKED[kind]
    config, tensors = llama_random.checkpoint(3, **llama_random.VARIANTS["llama3"] | {"intermediate_size": 160})
    source = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors, types)
    convert.convert(source, tmp_path / "converted")
    assert open_path(tmp_path / "converted").config.types
    notes = []
    for name, path in (("direct", source), ("dst", tmp_path / "converted")):
        notes.append(convert.export(path, tmp_path / name, dtype=dtype).notes[0])
    assert notes == [f"weights in {named} were expanded to {dtype or 'float32'}"] * 2
    found = tensors_of(tmp_path / "dst")
    assert_same(found, tensors_of(tmp_path / "direct"))
    assert {x.dtype for x in found.values()} == {np.dtype(dtype or "float32")}
    assert found.keys() == tensors.keys()
    for x, original in ((found[name].astype(np.float32), tensors[name]) for name in tensors):
        assert np.abs(x - original).max() <= 0.1 * np.abs(original).max()
    raw = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "quantization_config" not in raw
    assert raw == json.loads((tmp_path / "direct" / "config.json").read_text())


@WAYS
def test_packed_attention_beside_packed_experts(tmp_path, by):
    """Experts keep their MXFP4, which transformers reads."""
    config, tensors, _ = gpt_oss_random.checkpoint(5)
    source = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors, {"attn_output.weight": Q8_0})
    dst = exported(tmp_path, source, by)
    found = tensors_of(dst)
    packed = {name for name, x in found.items() if x.dtype == np.uint8}
    assert packed and packed == {name for name, x in tensors.items() if x.dtype == np.uint8}
    assert all(made.same_bits(found[name], tensors[name]) for name in packed)
    assert read_config(dst).mxfp4 == "experts" and read_config(dst).types == ()


def _with_tokenizer(path: Path, **changes: bytes) -> Path:
    """A GGUF file with a tokenizer of a few letters."""
    return gguf_from_hf.write(path, *llama_random.checkpoint(3), metadata=made_gguf.tokenizer(**changes))


@WAYS
def test_a_gguf_files_tokenizer(tmp_path, by):
    source = _with_tokenizer(tmp_path / "model.gguf")
    dst = exported(tmp_path, source, by)
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(os.listdir(dst)) == files
    for path in (source, dst):
        tokenizer = open_path(path).tokenizer()
        assert tokenizer.encode("abba") == [2, 1, 0]
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.context_length) == (None, (), 512)
    convert.export(source, dst, overwrite=True)


@WAYS
def test_what_is_not_hugging_faces_is_left_out_of_the_settings_and_said(tmp_path, by):
    settings = {
        "temp": made_gguf.number(made_gguf.F32, float("nan")),
        "top_k": made_gguf.number(made_gguf.I32, 40),
        "mirostat": made_gguf.number(made_gguf.I32, 2),
        "xtc_probability": made_gguf.number(made_gguf.F32, 0.0),
    }
    settings = {f"general.sampling.{key}": value for key, value in settings.items()}
    metadata = made_gguf.tokenizer(bos_token_id=made_gguf.number(made_gguf.U32, 3)) | settings
    source = gguf_from_hf.write(tmp_path / "model.gguf", *llama_random.checkpoint(3), metadata=metadata)
    if by == "converted":
        convert.convert(source, tmp_path / "converted")
        source = tmp_path / "converted"
    (note,) = convert.export(source, tmp_path / "dst").notes
    assert note.startswith(
        "generation_config.json lacks settings that cannot be followed: general.sampling.temp is nan"
    )
    assert note.endswith(", gptjax has no general.sampling.mirostat")
    found, config = (
        json.loads((tmp_path / "dst" / f"{name}.json").read_text()) for name in ("generation_config", "config")
    )
    assert found == {"do_sample": True, "top_k": 40, "bos_token_id": 3, "eos_token_id": None}
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, None)  # else transformers takes those of Llama


@WAYS
def test_a_tokenizer_of_an_unknown_kind_stays_in_metadata(tmp_path, by):
    source = _with_tokenizer(tmp_path / "model.gguf", pre=made_gguf.string("dbrx"))
    if by == "converted":
        convert.convert(source, tmp_path / "converted")
        source = tmp_path / "converted"
    (note,) = convert.export(source, tmp_path / "dst").notes
    assert re.match(r"tokenizer.json is missing: .* has tokenizer.ggml.pre 'dbrx'", note)
    assert set(os.listdir(tmp_path / "dst")) == {"config.json", "model.safetensors", "metadata.gguf"}


@WAYS
def test_a_file_without_a_tokenizer(tmp_path, by):
    source = gguf_from_hf.write(tmp_path / "model.gguf", *llama_random.checkpoint(3))
    if by == "converted":
        convert.convert(source, tmp_path / "converted")
        source = tmp_path / "converted"
    (note,) = convert.export(source, tmp_path / "dst").notes
    assert re.fullmatch(r"tokenizer.json is missing: .*\.gguf does not describe a tokenizer", note)


@WAYS
def test_a_damaged_tokenizer_is_an_error(tmp_path, by):
    source = _with_tokenizer(tmp_path / "model.gguf", merges=made_gguf.array(made_gguf.STRING, ["b z"]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.merges has 'b z'"):
        exported(tmp_path, source, by)
    assert not (tmp_path / "dst").exists()
