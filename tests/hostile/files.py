"""Hand-made hostile files of every format but GGUF (tests/gguf/test_hostile.py), each with its expected error."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.checkpoints import weights_material
from tests.convert import made
from tests.gguf import made as gguf
from tests.hostile import formats
from tests.oracles import gpt2_random, gpt_oss_random, llama_random
from tests.text import test_gguf_tokenizer

Make = Callable[[Path], object]


class Row(NamedTuple):
    make: Make
    said: str  # part of the error


class Group(NamedTuple):
    """Rows of one format."""

    read: Callable[[Path], object]
    file: str  # which the error names
    rows: dict[str, Row]


HUGE = 2**64 - 1
DEEP = "[" * 100_000 + "]" * 100_000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
ONE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def put(name: str, data: bytes | str) -> Make:
    return lambda directory: (directory / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def tensors(header: object, *, data: bytes = bytes(16), length: int | None = None) -> Make:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda directory: made.write_raw(directory / "model.safetensors", text, data, length=length)


def tensor(**changes: object) -> Make:
    """A file of one tensor of four numbers, its entry changed."""
    return tensors({"a": {**ONE, **changes}})


def two(first: list[int], second: list[int], size: int) -> Make:
    """A file of two tensors of two numbers each, at these offsets."""
    entry = {"dtype": "F32", "shape": [2]}
    return tensors({"a": {**entry, "data_offsets": first}, "b": {**entry, "data_offsets": second}}, data=bytes(size))


SAFETENSORS = {
    "an empty file": Row(put("model.safetensors", b""), "is truncated: expected 10 bytes, found 0"),
    "seven bytes": Row(put("model.safetensors", bytes(7)), "is truncated: expected 10 bytes, found 7"),
    "a header of 2^64 - 1 bytes": Row(tensors(b"{}", length=HUGE), f"its header claims {HUGE:,} bytes; at most"),
    "a header of 2^63 bytes": Row(tensors(b"{}", length=2**63), f"its header claims {2**63:,} bytes; at most"),
    "a header beyond the file": Row(
        tensors(b"{}", length=1 << 24), "is truncated: expected 16,777,224 bytes, found 26"
    ),
    "not JSON": Row(tensors(b"{'a': 1}"), "its header is not valid JSON (Expecting property name"),
    "not UTF-8": Row(tensors(b'{"\xff": 1}'), "its header is not valid JSON ('utf-8' codec"),
    "a list": Row(tensors([1, 2]), "it is a JSON list, expected an object"),
    "arrays in each other": Row(tensors(b'{"a": ' + DEEP.encode() + b"}"), "nested too deeply, more than 64 levels"),
    "a tensor twice": Row(
        tensors(f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}'.encode()), "the key 'a' occurs twice"
    ),
    "NaN": Row(tensors(b'{"__metadata__": {"x": NaN}}'), "NaN is not JSON"),
    "an entry that is a number": Row(tensors({"a": 1}), "its entry 'a' does not consist of dtype, shape and data_off"),
    "an entry with more": Row(tensor(more=1), "its entry 'a' does not consist of dtype, shape and data_offsets"),
    "a name of 100,000 letters": Row(tensors({"a" * 100_000: 1}), "aaa… does not consist of dtype"),
    "an escape in a name": Row(tensors({"\x1b[2J": 1}), r"its entry '\x1b[2J' does not consist of dtype"),
    "a negative size": Row(tensor(shape=[-2, -2]), "'a' has the invalid shape [-2, -2]"),
    "a size of 2.0": Row(tensor(shape=[2.0, 2]), "'a' has the invalid shape [2.0, 2]"),
    "a size that is true": Row(tensor(shape=[True, 4]), "'a' has the invalid shape [True, 4]"),
    "a product that is 4 in 64 bits": Row(tensor(shape=[2**62, 2**62, 4, 4]), "4611686018427387904, 4, 4], has 16 byt"),
    "33 axes": Row(tensor(shape=[1] * 32 + [4]), "'a' has the invalid shape [1, 1, 1"),
    "an unknown dtype": Row(tensor(dtype="F99"), "'a' has the unknown dtype 'F99'"),
    "a dtype that is a list": Row(tensor(dtype=["F32"]), "'a' has the unknown dtype ['F32']"),
    "offsets in disorder": Row(tensor(data_offsets=[16, 0]), "'a' has the invalid data_offsets [16, 0]"),
    "negative offsets": Row(tensor(data_offsets=[-16, 0]), "'a' has the invalid data_offsets [-16, 0]"),
    "offsets of 2^63": Row(tensor(data_offsets=[2**63, 2**63 + 16]), "'a' has the invalid data_offsets [92233720368"),
    "tensors that overlap": Row(two([0, 8], [4, 12], 12), "the data of 'b' overlaps another tensor's or leaves a gap"),
    "tensors in one place": Row(two([0, 8], [0, 8], 8), "the data of 'b' overlaps another tensor's or leaves a gap"),
    "a gap": Row(two([0, 8], [12, 20], 20), "the data of 'b' overlaps another tensor's or leaves a gap"),
    "data that are cut off": Row(tensors({"a": ONE}, data=bytes(15)), "is truncated: expected"),
    "more data": Row(tensors({"a": ONE}, data=bytes(17)), "but its header accounts for"),
    "a Git LFS pointer": Row(put("model.safetensors", LFS), "is a Git LFS pointer, not the file itself: run `git lfs"),
    "a web page": Row(put("model.safetensors", "<!DOCTYPE html>"), "is a web page, not weights"),
    "a ggml file": Row(put("model.safetensors", b"lmgg" + bytes(60)), "is a ggml file from before GGUF"),
}


def bomb(name: str, protocol: int = 2) -> Make:
    return lambda directory: (directory / name).write_bytes(
        pickle.dumps(formats.Bomb(directory / "exploded"), protocol=protocol)
    )


PICKLES = {
    "pytorch_model.bin": Row(
        bomb("pytorch_model.bin"), "pytorch_model.bin is a PyTorch pickle file; gptjax never opens"
    ),
    "a pickle of protocol 5": Row(bomb("model.pt", 5), "model.pt is a PyTorch pickle file; gptjax never opens"),
    "a pickle of protocol 0": Row(bomb("model.ckpt", 0), "model.ckpt is a PyTorch pickle file; gptjax never opens"),
    "a pickle called safetensors": Row(bomb("model.safetensors"), "model.safetensors is a PyTorch pickle file"),
    "a zip called safetensors": Row(
        put("model.safetensors", b"PK\3\4" + bytes(60)), "a zip archive, as torch.save writes it"
    ),
}


def index(weight_map: object, *files: str) -> Make:
    """An index, and files that have the tensor a."""

    def make(directory: Path) -> None:
        for name in files:
            made.write(directory / name, {"a": formats.TENSORS["wte.weight"]})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def linked(**links: str) -> Make:
    """An index that names the first of these links."""

    def make(directory: Path) -> None:
        for name, target in links.items():
            (directory / f"{name}.safetensors").symlink_to(target)
        index({"a": f"{next(iter(links))}.safetensors"})(directory)

    return make


NOT_PLAIN = "which is not a plain file name; an index may only name files in its own directory"
INDEX = {
    "a file above": Row(index({"a": "../x.safetensors"}), f"names the file '../x.safetensors', {NOT_PLAIN}"),
    "an absolute path": Row(index({"a": "/etc/x.safetensors"}), f"names the file '/etc/x.safetensors', {NOT_PLAIN}"),
    "a path of another system": Row(index({"a": "..\\x.safetensors"}), NOT_PLAIN),
    "a NUL": Row(index({"a": "x\0.safetensors"}), rf"names the file 'x\x00.safetensors', {NOT_PLAIN}"),
    "no name": Row(index({"a": ""}), f"names the file '', {NOT_PLAIN}"),
    "the directory itself": Row(index({"a": "."}), f"names the file '.', {NOT_PLAIN}"),
    "half a surrogate pair": Row(index({"a": "\ud800.safetensors"}), "which is not a usable name"),
    "a name of 100,000 letters": Row(
        index({"a": "x" * 100_000 + ".safetensors"}), "xxx… cannot be read (File name too long): use a shorter name"
    ),
    "the index itself": Row(index({"a": "model.safetensors.index.json"}), "which is not a safetensors file"),
    "a pickle": Row(
        index({"a": "pytorch_model.bin"}), "names the file 'pytorch_model.bin', which is not a safetensors"
    ),
    "a link that leads out": Row(linked(a="/etc/passwd"), "a link that leads out of the directory"),
    "a link above": Row(linked(a="../x.safetensors"), "a link that leads out of the directory"),
    "a link to itself": Row(linked(a="a.safetensors"), "loop"),
    "links in a circle": Row(linked(a="b.safetensors", b="a.safetensors"), "loop"),
    "a link to nothing": Row(linked(a="b.safetensors"), "links to a file that does not exist; download the file"),
    "a file that is not there": Row(index({"a": "x.safetensors"}), "x.safetensors does not exist but belongs to the"),
    "a tensor in two files": Row(
        index({"a": "x.safetensors", "b": "y.safetensors"}, "x.safetensors", "y.safetensors"),
        "a is in several files: x.safetensors, y.safetensors",
    ),
    "a tensor that is not there": Row(
        index({"a": "x.safetensors", "b": "x.safetensors"}, "x.safetensors"), "says that b is in x.safetensors, but it"
    ),
    "a name twice": Row(
        put("model.safetensors.index.json", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "the key 'a' occurs twice",
    ),
    "a list": Row(index(["a"]), "has no weight_map from tensor names to file names"),
    "a list in place of a file": Row(index({"a": [["x"]]}), "has no weight_map from tensor names to file names"),
    "nothing": Row(index({}), "lists no tensors"),
    "arrays in each other": Row(put("model.safetensors.index.json", DEEP), "nested too deeply, more than 64 levels"),
    "50 files above": Row(index({f"{n}": f"../{n}.safetensors" for n in range(50)}), "and 30 more"),
}


def config(base: dict[str, Any], **changes: object) -> Make:
    return lambda directory: formats.write(directory, "config.json", {**base, **changes})


GPT2, GPT_OSS, LLAMA = gpt2_random.CONFIG, gpt_oss_random.CONFIG, llama_random.CONFIG
CONFIG = {
    "an empty file": Row(put("config.json", b""), "config.json is damaged: not valid JSON (Expecting value"),
    "not UTF-8": Row(put("config.json", b'{"a": "\xff"}'), "config.json is damaged: not valid JSON or text ('utf-8'"),
    "a list": Row(put("config.json", "[]"), "config.json is damaged: it contains a JSON list, not an object"),
    "arrays in each other": Row(put("config.json", f'{{"a": {DEEP}}}'), "nested too deeply, more than 64 levels"),
    "a number of 5,000 digits": Row(
        put("config.json", f'{{"vocab_size": {"9" * 5000}}}'), "not valid JSON (Exceeds the"
    ),
    "five megabytes": Row(put("config.json", " " * 5_000_000), "is larger than the limit of 4,194,304 bytes"),
    "a Git LFS pointer": Row(put("config.json", LFS), "config.json is a Git LFS pointer"),
    "another model": Row(
        config(GPT2, model_type="mamba"), "has model_type 'mamba'; gptjax supports gpt2, gpt_oss, llama"
    ),
    "a model that is a list": Row(config(GPT2, model_type=[["gpt2"]]), "has model_type [['gpt2']]; gptjax supports"),
    "2^62 tokens": Row(config(GPT2, vocab_size=2**62), f"vocab_size is {2**62}; expected a whole number from 1 to"),
    "10^400 positions": Row(config(GPT2, n_positions=10**400), "n_positions is 10000"),
    "a billion layers": Row(
        config(LLAMA, num_hidden_layers=10**9), "num_hidden_layers is 1000000000; expected a whole"
    ),
    "a negative width": Row(config(LLAMA, hidden_size=-96), "hidden_size is -96; expected a whole number from 1 to"),
    "no heads": Row(config(LLAMA, num_attention_heads=0), "num_attention_heads is 0; expected a whole number from 1"),
    "half a head": Row(config(GPT2, n_head=2.5), "n_head is 2.5; expected a whole number"),
    "an epsilon of NaN": Row(
        config(LLAMA, rms_norm_eps=float("nan")), "rms_norm_eps is nan; expected a number above 0"
    ),
    "a theta of 10^400": Row(config(LLAMA, rope_theta=10**400), "rope_theta is 10000"),
    "a scaling that is a list": Row(config(LLAMA, rope_scaling=[[]]), "rope_scaling is [[]]; expected an object"),
    "200,000 layer types": Row(
        config(GPT_OSS, layer_types=["full_attention"] * 200_000),
        "layer_types has 200000 entries, but num_hidden_layers is 3",
    ),
    "more experts a token than there are": Row(
        config(GPT_OSS, num_experts_per_tok=7), "7 experts per token, but there are only 6"
    ),
    "an unknown key": Row(config(GPT2, rotary_dim=64), "unknown key rotary_dim: gptjax does not know what it changes"),
    "an escape in a key": Row(config(GPT2, **{"\x1b[2J": 1}), r"unknown key '\x1b[2J'"),
    "a packed type that is unknown": Row(
        config(GPT2, quantization_config={"quant_method": "ggml", "types": {"../x": ["Q9"]}}),
        "types of '../x' are ['Q9']",
    ),
}


def generation(**changes: object) -> Make:
    return lambda directory: formats.write(directory, "generation_config.json", {**formats.GENERATION, **changes})


GENERATION = {
    "a list": Row(put("generation_config.json", "[1]"), "it contains a JSON list, not an object"),
    "arrays in each other": Row(put("generation_config.json", DEEP), "nested too deeply, more than 64 levels"),
    "a text for an id": Row(generation(eos_token_id="5"), "eos_token_id is '5'; expected a token id, or a list"),
    "ids in a list of lists": Row(
        generation(eos_token_id=[[5]]), "eos_token_id is [[5]]; expected a token id, or a list"
    ),
    "a negative id": Row(generation(eos_token_id=-1), "eos_token_id is -1; expected a token id"),
    "a temperature of NaN": Row(generation(temperature=float("nan")), "temperature is nan; expected a number above 0"),
    "a temperature of 10^400": Row(generation(temperature=10**400), "temperature is 10000"),
    "a top_k of 2^70": Row(generation(top_k=2**70), f"top_k is {2**70}; expected a whole number"),
    "beams": Row(generation(num_beams=4), "num_beams: gptjax has no such setting"),
    "a key of 100,000 letters": Row(generation(**{"k" * 100_000: 1}), "kkk…: gptjax has no such setting"),
}


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(directory: Path) -> None:
        file = formats.byte_level_json()
        change(file)
        formats.write(directory, "tokenizer.json", file)

    return make


def normalizers(*each: dict[str, Any]) -> Make:
    return tokenizer(lambda file: file.update(normalizer={"type": "Sequence", "normalizers": list(each)}))


def cuts(*each: dict[str, Any]) -> Make:
    """More pre_tokenizers before the file's."""
    return tokenizer(
        lambda file: file.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [*each, file["pre_tokenizer"]]},
            # So that the library encodes something when the file is read.
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {},
            },
        )
    )


def cut_at(pattern: str) -> Make:
    return cuts({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def added(*tokens: dict[str, Any]) -> Make:
    return tokenizer(lambda file: file["added_tokens"].extend(tokens))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TOKENIZER = {
    "cut off": Row(put("tokenizer.json", '{"model": {"type": "BPE"'), "is damaged: not valid JSON"),
    "arrays in each other": Row(put("tokenizer.json", DEEP), "nested too deeply, more than 64 levels"),
    "no model": Row(tokenizer(lambda file: file.pop("model")), '"model" is missing or not an object'),
    "another model": Row(tokenizer(lambda file: file["model"].update(type="Unigram")), "its model is Unigram"),
    "tokens in a list": Row(
        tokenizer(lambda file: file["model"].update(vocab=[["a", 0]])), "its vocabulary is not an object of tokens"
    ),
    "an id twice": Row(tokenizer(lambda file: file["model"]["vocab"].update(x=5)), "two tokens have the same id"),
    "an id of 2^32": Row(tokenizer(lambda file: file["model"]["vocab"].update(xx=2**32)), "'xx' has the id 4294967296"),
    "a negative id": Row(tokenizer(lambda file: file["model"]["vocab"].update(xx=-1)), "token 'xx' has the id -1"),
    "half a surrogate pair": Row(
        tokenizer(lambda file: file["model"]["vocab"].update({"\ud800": 999})), "has half a surrogate pair"
    ),
    "a merge of unknown tokens": Row(
        tokenizer(lambda file: file["model"]["merges"].append(["zz", "q"])), "needs a token that the vocabulary lacks"
    ),
    "a merge that makes no token": Row(
        tokenizer(lambda file: file["model"]["merges"].append(["a", "a"])), "needs a token that the vocabulary lacks"
    ),
    "merges in arrays of arrays": Row(
        tokenizer(lambda file: file["model"]["merges"].append([["a"], ["b"]])), "[['a'], ['b']] is not a merge of two"
    ),
    "an added token twice": Row(
        added({"id": 300, "content": "<x>"}, {"id": 301, "content": "<x>"}), "two added tokens have the same content"
    ),
    "an added token of 2^40": Row(added({"id": 2**40, "content": "<x>"}), "the id 1099511627776"),
    "an added token with another's id": Row(added({"id": 5, "content": "<x>"}), "contradicts the vocabulary"),
    "an added token without content": Row(added({"id": 300}), "{'id': 300} has no content or no id"),
    "a pattern that is none": Row(cut_at("("), "is damaged: Oniguruma error: end pattern with unmatched parenthesis"),
    "a pattern that contains itself": Row(cut_at(r"(?<x>\g<x>?a)"), "is damaged: Oniguruma error: never ending recurs"),
    "a normalizer that doubles 40 times": Row(
        normalizers(*[replaced({"String": "a"}, "aa")] * 40),
        "its normalizer can make a text more than 64 times as long",
    ),
    "a normalizer that writes 100,000 letters": Row(
        normalizers(replaced({"Regex": "."}, "x" * 100_000)),
        "its normalizer can make a text more than 64 times as long",
    ),
    "a normalizer that begins with 100,000 letters": Row(
        normalizers({"type": "Prepend", "prepend": "x" * 100_000}), "its normalizer can make a text more than 64 times"
    ),
    "a normalizer with a table of its own": Row(
        normalizers({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "its normalizer can make a text more than 64 times as long",
    ),
    "bytes spelled 40 times": Row(cuts(*[BYTES] * 40), "it has several ByteLevel pre_tokenizers"),
    "an unknown normalizer": Row(
        tokenizer(lambda file: file.update(normalizer={"type": "\x1b[2J"})), "tokenizer.json is damaged: "
    ),
    "a text twice in the template": Row(
        tokenizer(
            lambda file: file.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {},
                }
            )
        ),
        "has a post_processor that repeats, leaves out or divides the text",
    ),
}


def pair(vocab: object = None, merges: str = "#version: 0.2\na b\n", **settings: object) -> Make:
    def make(directory: Path) -> None:
        formats.make_pair(directory)
        if vocab is not None:
            formats.write(directory, "vocab.json", vocab)
        (directory / "merges.txt").write_text(merges)
        formats.write(directory, "tokenizer_config.json", settings)

    return make


PAIR = {
    "an id that is a text": Row(pair({"a": "0"}), "vocab.json is damaged: token 'a' has the id '0', not an integer"),
    "no tokens": Row(pair({}), "vocab.json is damaged: its vocabulary is not an object"),
    "merges that are cut off": Row(
        pair({f"token {n}": n for n in range(300)}), "merges.txt is damaged: it is cut short"
    ),
    "a merge of one token": Row(pair(merges="ab\n"), "merges.txt is damaged: 'ab' is not a merge of two tokens"),
    "a merge of three tokens": Row(
        pair(merges="a b c\n"), "merges.txt is damaged: 'a b c' is not a merge of two tokens"
    ),
    "additions in a list": Row(pair(added_tokens_decoder=[[1]]), "tokenizer_config.json is damaged: added_tokens_deco"),
    "another tokenizer": Row(pair(tokenizer_class="\x1b[2J"), "which may cut text into words differently from GPT-2"),
    "an end that is a number": Row(pair(eos_token=5), "tokenizer_config.json has eos_token = 5, which is not in the"),
}


def template(name: str, value: object) -> Make:
    def make(directory: Path) -> None:
        formats.make_template(directory)
        (directory / "chat_template.jinja").unlink()
        put(name, value if isinstance(value, bytes) else json.dumps(value))(directory)

    return make


TEMPLATE = {
    "a number": Row(
        template("tokenizer_config.json", {"chat_template": 5}), "tokenizer_config.json is damaged: chat_tem"
    ),
    "templates without names": Row(
        template("tokenizer_config.json", {"chat_template": [{"template": "x"}]}),
        "is neither a text nor a list of named",
    ),
    "not UTF-8": Row(
        template("chat_template.jinja", b"{{ \xff }}"), "chat_template.jinja is damaged: not valid JSON or"
    ),
    "one that imports": Row(
        template("chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "gptjax does not know the tokenizer's chat template (its SHA-256 begins with",
    ),
    "one that never ends": Row(
        template("chat_template.jinja", b"{% for x in range(10 ** 18) %}{% endfor %}"),
        "gptjax does not know the tokenizer's chat template",
    ),
}


def manifest(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(directory: Path) -> None:
        weights_material.save(directory / "dst")
        path = directory / "dst" / "manifest.json"
        raw = json.loads(path.read_text())
        changed = change(raw)
        path.write_text(changed if isinstance(changed, str) else json.dumps(raw))

    return make


def leaf(**changes: object) -> Make:
    return manifest(lambda raw: raw["leaves"][0].update(changes))


def zarray(**changes: object) -> Make:
    """Another description of a weight, with a manifest that agrees about its size."""

    def make(directory: Path) -> None:
        weights_material.save(directory / "dst")
        path = next((directory / "dst" / "params").rglob(".zarray"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        manifest_path = directory / "dst" / "manifest.json"
        raw = json.loads(manifest_path.read_text())
        raw["pieces"][path.parts[-3]]["/".join(path.parts[-2:])] = path.stat().st_size
        manifest_path.write_text(json.dumps(raw))

    return make


MANIFEST = {
    "a later version": Row(
        manifest(lambda raw: raw.update(version=2)), "has version 2, but this gptjax reads version 1"
    ),
    "a version of 100,000 letters": Row(
        manifest(lambda raw: raw.update(version="v" * 100_000)), "vvv…, but this gptjax"
    ),
    "arrays in each other": Row(manifest(lambda raw: DEEP), "nested too deeply, more than 64 levels"),
    "no weights": Row(manifest(lambda raw: raw.pop("leaves")), "is damaged (KeyError: 'leaves')"),
    "a weight of a file above": Row(leaf(path="../../x"), "the weight '../../x' is not a path of names"),
    "a weight with a NUL": Row(leaf(path="a\0"), r"the weight 'a\x00' is not a path of names"),
    "a weight 100 levels deep": Row(leaf(path="/".join("a" * 100)), "is not a path of names joined with slashes"),
    "a weight twice": Row(manifest(lambda raw: raw["leaves"].append(raw["leaves"][0])), "a weight is listed twice"),
    "2^63 rows": Row(leaf(shape=[2**63, 4]), f"{2**63} is not a count"),
    "-6 rows": Row(leaf(shape=[-6, 4]), "-6 is not a count"),
    "1,000 axes": Row(leaf(shape=[1] * 1000), "is not a shape"),
    "arrays in a shape": Row(leaf(shape=[[6], [4]]), "[6] is not a count"),
    "an unknown dtype": Row(leaf(dtype="|O"), "the dtype '|O' is unknown"),
    "a dtype that is a list": Row(leaf(dtype=["float32"]), "is damaged"),
    "a piece above": Row(leaf(piece="../x"), "the piece '../x' is not a number"),
    "a piece that is not listed": Row(leaf(piece="9999"), "the piece 9999 is not listed"),
    "a file above": Row(
        manifest(lambda raw: raw["others"].update({"params/0000/../../../x": "0"})),
        "'params/0000/../../../x' is not the name of a file",
    ),
    "a file that is not there": Row(
        manifest(lambda raw: raw["pieces"]["0000"].update(x=5)), "params/0000 is damaged: its file x is missing"
    ),
    "a piece that is not there": Row(
        manifest(lambda raw: raw["pieces"].update({"9999": {}})), "params/9999 is missing; copy the whole directory"
    ),
    "another checksum": Row(leaf(crc32=0), "have changed"),
    "an enormous chunk": Row(zarray(shape=[1 << 40, 1 << 20], chunks=[1 << 40, 1 << 20]), "/.zarray does not describe"),
    "a compressed chunk": Row(zarray(compressor={"id": "zlib", "level": 9}), "/.zarray does not describe"),
    "objects in a chunk": Row(zarray(dtype="|O"), "/.zarray does not describe"),
    "a long description": Row(zarray(attributes="x" * 5000), "is larger than the limit of 4,096 bytes"),
}


def metadata(**changes: bytes) -> Make:
    """A converted directory's metadata.gguf with other values, `__` for a dot."""

    def make(directory: Path) -> None:
        values = {key: formats.packed_value(value) for key, value in test_gguf_tokenizer.gpt2().items()}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        (directory / "metadata.gguf").write_bytes(gguf.file(values))

    return make


F32, STRING = gguf.F32, gguf.STRING
METADATA = {
    "another file": Row(put("metadata.gguf", "{}"), "is not a GGUF file: it begins with b'{}'"),
    "a temperature that is a text": Row(
        metadata(general__sampling__temp=gguf.string("hot")), "general.sampling.temp is 'hot'; expected a number"
    ),
    "a temperature of NaN": Row(
        metadata(general__sampling__temp=gguf.number(F32, float("nan"))), "general.sampling.temp is nan; expected a num"
    ),
    "a top_k in a list": Row(
        metadata(general__sampling__top_k=gguf.array(gguf.I32, [40, 40])),
        "general.sampling.top_k is [40, 40]; expected a",
    ),
    "a top_p of 2": Row(
        metadata(general__sampling__top_p=gguf.number(F32, 2.0)),
        "general.sampling.top_p is 2.0; expected a number from 0",
    ),
    "another tokenizer": Row(metadata(tokenizer__ggml__model=gguf.string("wpm")), "tokenizer.ggml.model 'wpm'"),
    "a token twice": Row(
        metadata(tokenizer__ggml__tokens=gguf.array(STRING, ["a"] * 7)), "tokenizer.ggml.tokens has the token 'a' twice"
    ),
    "a type too few": Row(
        metadata(tokenizer__ggml__token_type=gguf.array(gguf.I32, [1] * 6)), "has 6 items for 7 tokens"
    ),
    "an end beyond the tokens": Row(
        metadata(tokenizer__ggml__eos_token_id=gguf.number(gguf.U32, 7)),
        "eos_token_id is 7, not the id of one of the 7",
    ),
    "a template that is a number": Row(
        metadata(tokenizer__chat_template=gguf.number(gguf.U32, 7)), "tokenizer.chat_template is"
    ),
}

GROUPS = {
    "safetensors": Group(formats.read_tensors, "model.safetensors", SAFETENSORS),
    "pickle": Group(formats.read_pickle, "", PICKLES),
    "index": Group(formats.read_tensors, "safetensors", INDEX),
    "config": Group(formats.read_config, "config.json", CONFIG),
    "generation": Group(formats.read_defaults, "generation_config.json", GENERATION),
    "tokenizer": Group(formats.read_text, "tokenizer.json", TOKENIZER),
    "vocab and merges": Group(formats.read_text, "", PAIR),
    "template": Group(formats.read_template, "template", TEMPLATE),
    "converted": Group(formats.read_converted, "dst", MANIFEST),
    "metadata.gguf": Group(formats.read_metadata, "metadata.gguf", METADATA),
}
CASES = [(group, name) for group, of in GROUPS.items() for name in of.rows]


def made_in(directory: Path, group: str, name: str) -> Path:
    """A row's files, in a directory of their own."""
    place = directory / f"{list(GROUPS).index(group)} {list(GROUPS[group].rows).index(name)}"
    os.makedirs(place)
    GROUPS[group].rows[name].make(place)
    return place
