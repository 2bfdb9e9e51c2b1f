"""The formats that a checkpoint's files have, other than GGUF's tensors: a small valid one of each, and its reader."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from gptjax.checkpoints import journal, text_files, weights
from gptjax.checkpoints.checkpoint import open_path
from gptjax.checkpoints.manifest import Leaf, Manifest, is_converted
from gptjax.checkpoints.orbax_piece import checksum, other_files, write_piece
from gptjax.checkpoints.safetensors import open_directory
from gptjax.config import generation_defaults, read_config, read_generation_config
from gptjax.errors import RequestError
from gptjax.text import Tokenizer, load_tokenizer
from gptjax.text.chat_formats import choose_format
from tests.checkpoints import weights_material
from tests.convert import made
from tests.gguf import made as gguf
from tests.oracles import gpt2_random, gpt_oss_random, llama_random
from tests.text import sentencepiece_material, test_gguf_tokenizer, text_material

DATA = Path(__file__).resolve().parents[1] / "data"
TENSORS = {
    "wte.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "h.0.ln_1.bias": np.arange(3, dtype=np.float16),
    "h.0.blocks": np.arange(8, dtype=np.uint8).reshape(2, 4),
}


class Format(NamedTuple):
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    count: int  # of mutations in a full run


# Tensors.


def read_tensors(directory: Path) -> None:
    source = open_directory(directory)
    for name, info in source.tensors.items():
        if info.dtype in ("F32", "F16", "BF16", "U8"):
            assert source.read(name).shape == info.shape


def read_pickle(directory: Path) -> None:
    """Every file that a pickle's bytes and name are left of is refused. The bomb in it must not go off."""
    try:
        open_directory(directory)
    finally:
        assert not (directory / "exploded").exists()


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.mkdir, (str(self.path),)


def make_pickle(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Bomb(directory / "exploded")}, 2))


# Settings.


def write(directory: Path, name: str, value: object) -> None:
    text_material.write_json(directory, name, value)


def read_defaults(directory: Path) -> None:
    generation_defaults(read_generation_config(directory), directory).check()


GENERATION = {
    **{"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    **{"eos_token_id": [2, 5], "bos_token_id": 1, "num_beams": 1, "max_length": 40, "transformers_version": "5.0.0"},
}


# Tokenizers.


def byte_level_json() -> dict[str, Any]:
    """A tokenizer.json of GPT-2's kind, with a token for each byte, and two merges."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*letters, "ab", "Ġab"])}
    file = {**text_material.demo_json(), "added_tokens": []}
    file["model"] |= {"vocab": vocab, "merges": [["a", "b"], ["Ġ", "ab"]]}
    return text_material.with_added(file, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def make_byte_level(directory: Path) -> None:
    write(directory, "tokenizer.json", byte_level_json())
    write(directory, "tokenizer_config.json", {"eos_token": "<|im_end|>", "add_prefix_space": False})
    write(directory, "special_tokens_map.json", {"bos_token": {"content": "<|im_start|>"}, "pad_token": "<pad>"})
    write(directory, "added_tokens.json", {"<pad>": 270})


def make_pair(directory: Path) -> None:
    file = byte_level_json()
    write(directory, "vocab.json", file["model"]["vocab"] | {"<|endoftext|>": 258})
    merges = "\n".join(" ".join(pair) for pair in file["model"]["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    later = {"259": {"content": "<tool>", "special": False, "lstrip": True}}
    write(directory, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": later})


def use(tokenizer: Tokenizer) -> None:
    try:
        tokenizer.decode(tokenizer.prompt("ab aba é<|im_end|><s>", special=True))
        stream = tokenizer.stream()
        for number in range(tokenizer.vocab_size if tokenizer.vocab_size < 1000 else 3):
            stream.push(number)
    except RequestError as error:  # a byte has lost its token
        assert "no token for the bytes" in str(error)


def read_text(directory: Path) -> None:
    use(load_tokenizer(directory))


def make_template(directory: Path) -> None:
    write(directory, "tokenizer.json", byte_level_json())
    template = (DATA / "chat_templates" / "chatml.jinja").read_text(encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def make_named_templates(directory: Path) -> None:
    template = (DATA / "chat_templates" / "chatml.jinja").read_text(encoding="utf-8")
    write(directory, "tokenizer.json", byte_level_json())
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "{{ x }}"}]
    write(directory, "tokenizer_config.json", {"chat_template": named})


def read_template(directory: Path) -> None:
    choose_format(load_tokenizer(directory))


# What gptjax itself writes.


def read_converted(directory: Path) -> None:
    directory = directory / "dst"
    assert is_converted(directory) in (True, False)
    expected = weights_material.targets_of()
    found = {path: read() for path, read in weights.readers(directory, weights.checked_manifest(directory, expected))}
    assert {path: array.shape for path, array in found.items()} == {
        path: leaf.shape for path, leaf in weights.flatten(expected).items()
    }


LEAVES = {("block_0", "bias"): np.arange(4, dtype=np.float32), ("block_1", "bias"): np.arange(6, dtype=np.float16)}
SHAPES = [{path: (array.shape, array.dtype.name)} for path, array in LEAVES.items()]


def make_journal(directory: Path) -> None:
    """A journal of two pieces. What is read is a copy, because a journal that is opened deletes what it cannot use."""
    new = directory / "new"
    new.mkdir()
    written = journal.Journal(new, "job", SHAPES, lambda _: None)
    for number, (path, array) in enumerate(LEAVES.items()):
        piece = journal.piece_name(number)
        files = write_piece(new / "params" / piece, weights.nest({path: array}))
        crc = checksum(array)
        leaf = Leaf(path, array.shape, array.dtype.name, piece, crc)
        others = {
            f"params/{piece}/{name}": sha for name, sha in other_files(new / "params" / piece, files, [leaf]).items()
        }
        written.add(journal.Complete(Manifest("1", "test", (), (leaf,), {piece: files}, others), {"a": 1}))


def read_journal(directory: Path) -> None:
    """Pieces are complete or not; nothing else comes of a journal, whatever is in it."""
    copy = directory.with_name("journal copy")
    shutil.copytree(directory, copy)
    try:
        found = journal.Journal(copy / "new", "job", SHAPES, lambda _: None)
        for number, done in enumerate(found.complete):
            (leaf,) = done.manifest.leaves
            assert {leaf.path: (leaf.shape, leaf.dtype)} == SHAPES[number]
    finally:
        shutil.rmtree(copy)


# GGUF's metadata, and what is made of it. (Its tensors: tests/gguf/test_fuzz.py.)


def packed_value(value: Any) -> bytes:
    if isinstance(value, str):
        return gguf.string(value)
    if isinstance(value, list):
        kind = gguf.STRING if isinstance(value[0], str) else gguf.F32 if isinstance(value[0], float) else gguf.I32
        return gguf.array(kind, value)
    return gguf.number(gguf.F32 if isinstance(value, float) else gguf.U32, value)


SAMPLING = {"temp": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "penalty_repeat": 1.1}
DENSE = {
    **{"context_length": 64, "embedding_length": 8, "block_count": 1, "feed_forward_length": 12},
    **{"attention.head_count": 2, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5},
}


def make_gguf(directory: Path, text: dict[str, Any], architecture: str) -> None:
    metadata = {**text, "general.architecture": architecture, "tokenizer.chat_template": "{{ x }}"}
    metadata |= {f"general.sampling.{key}": value for key, value in SAMPLING.items()}
    metadata |= {f"{architecture}.{key}": value for key, value in DENSE.items()}
    entries = {
        "token_embd.weight": gguf.Entry(0, [8, 4], bytes(128)),
        "output.weight": gguf.Entry(2, [32, 1], bytes(18)),
    }
    data = gguf.file({key: packed_value(value) for key, value in metadata.items()}, entries)
    (directory / "model.gguf").write_bytes(data)


def make_byte_level_gguf(directory: Path) -> None:
    make_gguf(directory, test_gguf_tokenizer.gpt2(bos_token_id=6, eos_token_id=6), "qwen2")


def make_sentencepiece_gguf(directory: Path) -> None:
    make_gguf(directory, test_gguf_tokenizer.llama(), "llama")


def read_gguf(directory: Path) -> None:
    checkpoint = open_path(directory / "model.gguf")
    use(checkpoint.tokenizer())
    checkpoint.defaults.check()


def make_metadata(directory: Path) -> None:
    make_byte_level_gguf(directory)
    (directory / "model.gguf").rename(directory / text_files.METADATA)


def read_metadata(directory: Path) -> None:
    text = text_files.text_of(directory)
    generation_defaults(text.settings(), text.config_directory, source=text.source, words=text.words).check()
    use(text.tokenizer({}))


def config_of(model: Any) -> Callable[[Path], object]:
    return lambda directory: write(directory, "config.json", model)


FORMATS = {
    "safetensors": Format(lambda d: made.write(d / "model.safetensors", TENSORS), read_tensors, 20_000),
    "safetensors index": Format(lambda d: made.write_sharded(d, TENSORS, 2), read_tensors, 6_000),
    "pickle": Format(make_pickle, read_pickle, 4_000),
    "config gpt2": Format(config_of(gpt2_random.CONFIG), read_config, 10_000),
    "config gpt_oss": Format(config_of(gpt_oss_random.CONFIG), read_config, 10_000),
    "config llama": Format(
        config_of({**llama_random.CONFIG, **llama_random.VARIANTS["llama3.1"]}), read_config, 10_000
    ),
    "generation_config": Format(lambda d: write(d, "generation_config.json", GENERATION), read_defaults, 10_000),
    "tokenizer byte-level": Format(make_byte_level, read_text, 4_000),
    "tokenizer sentencepiece": Format(
        lambda d: write(d, "tokenizer.json", sentencepiece_material.llama2_json()), read_text, 1_500
    ),
    "vocab and merges": Format(make_pair, read_text, 4_000),
    "chat template": Format(make_template, read_template, 2_000),
    "chat templates": Format(make_named_templates, read_template, 2_000),
    "converted": Format(lambda d: weights_material.save(d / "dst"), read_converted, 3_000),
    "journal": Format(make_journal, read_journal, 1_000),
    "gguf byte-level": Format(make_byte_level_gguf, read_gguf, 5_000),
    "gguf sentencepiece": Format(make_sentencepiece_gguf, read_gguf, 5_000),
    "metadata.gguf": Format(make_metadata, read_metadata, 3_000),
}
