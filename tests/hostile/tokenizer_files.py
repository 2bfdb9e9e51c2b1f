"""Hand-made hostile files of tokenizers and chat templates, each with its expected error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gguf import made as gguf
from tests.hostile import formats
from tests.hostile.rows import DEEP, Make, Row, put
from tests.text import test_gguf_tokenizer


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
    "a normalizer with the keys of two types": Row(
        normalizers({**replaced({"Regex": "."}, "x" * 100_000), "normalizers": []}),
        "its normalizer can make a text more than 64 times as long",
    ),
    "spaces spelled 60 times": Row(
        cuts(*[{"type": "Metaspace", "replacement": mark, "prepend_scheme": "always"} for mark in "xyz" * 20]),
        "it has several Metaspace pre_tokenizers",
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
