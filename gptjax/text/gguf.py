"""The tokenizer that a GGUF file's metadata describes, as llama.cpp reads it (src/llama-vocab.cpp)."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gptjax.errors import CheckpointError
from gptjax.support.quoting import names, quoted
from gptjax.text.framing import Token, post_processor
from gptjax.text.gguf_fields import PREFIX, Fields
from gptjax.text.kinds import EXTRA_SPACES, PREPEND, REPLACE
from gptjax.text.pieces import equal_scores, merges_of
from gptjax.text.pretokenizers import CUTS, Cut
from gptjax.text.spelling import SENTENCEPIECE
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.vocabulary import AddedToken, Vocabulary, build_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf's TokenType

_ENDS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
_OTHER_IDS: Final = (
    *(f"{name}_token_id" for name in ("bos", "unknown", "seperator", "separator", "padding", "mask", "cls")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(f"{name}_token_id" for name in ("prefix", "suffix", "middle")),
)
_KNOWN: Final = frozenset(  # added_tokens, of GGUF's specification, repeats some of tokens
    {*_ENDS, *_OTHER_IDS, "model", "pre", "tokens", "token_type", "scores", "merges", "added_tokens"}
    | {"add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"}
)
# What llama.cpp ends a generation at, whatever the file says, and takes for a control token. It adds "</s>", which is
# an ordinary token of Qwen's; in the models of this family that end at it, it is the file's eos.
_END_TEXTS: Final = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "<|end_of_text|>"}
    | {"<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<EOT>", "_<EOT>", "[EOT]"}
)
# In gpt-oss, <|end|> ends a message, after which another begins.
_HARMONY: Final = frozenset({"<|return|>", "<|call|>"})
_DEFAULT_BOS, _DEFAULT_EOS = 1, 2  # of SentencePiece


@dataclass(frozen=True, slots=True)
class Description:
    """What a GGUF file says about its tokenizer."""

    vocabulary: Vocabulary
    ids: Mapping[str, int | None]
    """Of tokens with a purpose, by their keys, such as "bos_token_id"."""
    eos_ids: tuple[int, ...]
    context_length: int | None
    chat_template: str | None


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str | os.PathLike[str] = "the GGUF file") -> Tokenizer:
    """The tokenizer of a GGUF file. Arguments and errors are those of `describe`."""
    found = describe(metadata, source)
    return Tokenizer(
        found.vocabulary,
        bos_id=found.ids["bos_token_id"],
        eos_ids=found.eos_ids,
        context_length=found.context_length,
        chat_template=found.chat_template,
    )


def describe(metadata: Mapping[str, Any], source: str | os.PathLike[str]) -> Description:
    """Reads what a GGUF file says about its tokenizer.

    Generation stops at eos, eot, eom and any other token that llama.cpp knows as an end by its text (but not at those
    for filling in the middle), except gpt-oss's <|end|>.

    Args:
      metadata: the file's, as ints, floats, bools, texts and lists.
      source: the file, for messages.

    Raises:
      CheckpointError: a value is missing or damaged.
      ConfigError: the tokenizer is of a kind that gptjax does not read.
    """
    fields = Fields(Path(source), metadata)
    if not fields.has("model"):
        raise CheckpointError(
            f"no tokenizer: {source} has no {PREFIX}model; name a directory or another GGUF file that has one "
            "(--tokenizer, or tokenizer= in gptjax.load); without a tokenizer the model still works on token ids"
        )
    model = fields.text("model")
    if model not in ("gpt2", "llama"):
        raise fields.unsupported(
            "model", f"{quoted(model)}; gptjax reads gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    fields.refuse_others(_KNOWN)
    if fields.flag("add_sep_token", False):
        raise fields.unsupported("add_sep_token", "true, and gptjax puts no separators into a text")
    tokens = fields.tokens()
    types = fields.types(len(tokens))
    found = {key: fields.token_id(key, len(tokens)) for key in (*_ENDS, *_OTHER_IDS)}
    is_llama = model == "llama"
    if is_llama:
        for key, default in (("bos_token_id", _DEFAULT_BOS), ("eos_token_id", _DEFAULT_EOS)):
            if found[key] is None and default < len(types) and types[default] == CONTROL:
                found[key] = default
    build = _sentencepiece if is_llama else _byte_level
    vocabulary = build(Path(source), fields, tokens, types, found)
    return Description(
        vocabulary,
        found,
        _ends(tokens, types, [found[key] for key in _ENDS]),
        _context_length(metadata),
        _chat_template(Path(source), metadata),
    )


def _byte_level(
    path: Path, fields: Fields, tokens: list[str], types: list[int], found: Mapping[str, int | None]
) -> Vocabulary:
    cut = _cut(fields)
    if BYTE in types:
        raise fields.unsupported("token_type", "6 (byte) for a token, but a byte-level BPE has no such tokens")
    merges = fields.merges(set(tokens))
    merged = {part for pair in merges for part in pair} | {left + right for left, right in merges}
    kinds = zip(tokens, types, strict=True)
    return build_vocabulary(
        path,
        {token: number for number, (token, kind) in enumerate(kinds) if token and (kind == NORMAL or token in merged)},
        merges,
        _added(tokens, types),
        normalizer=cut.normalizer,
        pre_tokenizer=cut.pre_tokenizer,
        ignore_merges=cut.ignore_merges,
        post_processor=_frame(fields, found, tokens, add_bos=cut.add_bos),
    )


def _cut(fields: Fields) -> Cut:
    known = f"gptjax knows {names(sorted(CUTS), len(CUTS))}"
    if not fields.has("pre"):
        raise fields.unsupported("model", f"'gpt2', but no {PREFIX}pre, which says how text is cut into words; {known}")
    cut = CUTS.get(fields.text("pre"))
    if cut is None:
        raise fields.unsupported("pre", f"{quoted(fields.text('pre'))}; {known}")
    if not fields.flag("add_space_prefix", False):
        return cut
    if cut.pre_tokenizer["type"] != "ByteLevel":
        raise fields.unsupported("add_space_prefix", f"true, which goes with gpt-2 only, not {fields.text('pre')}")
    return replace(cut, pre_tokenizer={**cut.pre_tokenizer, "add_prefix_space": True})


def _sentencepiece(
    path: Path, fields: Fields, tokens: list[str], types: list[int], found: Mapping[str, int | None]
) -> Vocabulary:
    kinds = list(zip(tokens, types, strict=True))
    if sorted(token for token, kind in kinds if kind == BYTE) != sorted(SENTENCEPIECE.byte_tokens):
        raise fields.fault("tokens", "must have <0x00> to <0xFF>, and no others, with type 6 (byte)")
    scores = {
        token: score
        for (token, kind), score in zip(kinds, fields.scores(len(tokens)), strict=True)
        if token and kind == NORMAL and token not in _END_TEXTS
    }
    try:
        merges = merges_of(scores)
    except ValueError as error:
        raise fields.fault("tokens", str(error)) from None
    if equal := equal_scores(scores, merges):
        raise fields.unsupported(
            "scores",
            f"that give {quoted(equal[0])} and {quoted(equal[1])} the same score, and so no order in which to build "
            "them: use the Hugging Face checkpoint that the file was made from",
        )
    prefix = fields.flag("add_space_prefix", True)
    trims = fields.flag("remove_extra_whitespaces", False)
    return build_vocabulary(
        path,
        {token: n for n, (token, kind) in enumerate(kinds) if token in scores or kind == BYTE},
        merges,
        _added(tokens, types),
        normalizer={
            "type": "Sequence",
            "normalizers": [*(EXTRA_SPACES if trims else []), *([PREPEND] if prefix else []), REPLACE],
        },
        post_processor=_frame(fields, found, tokens, add_bos=True),
        spelling=SENTENCEPIECE,
        strips_space=prefix,
    )


def _added(tokens: list[str], types: list[int]) -> list[AddedToken]:
    added = []
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        special = kind in (CONTROL, UNKNOWN) or _is_end(token, kind)
        if token and (special or kind == USER_DEFINED):
            added.append(AddedToken(token, number, special=special))
    return added


def _frame(
    fields: Fields, found: Mapping[str, int | None], tokens: list[str], *, add_bos: bool
) -> dict[str, Any] | None:
    """The post_processor for add_bos_token and add_eos_token."""
    around: list[Token | None] = []
    for which, default in (("bos", add_bos), ("eos", False)):
        flag, number = f"add_{which}_token", found[f"{which}_token_id"]
        adds = fields.flag(flag, default)
        if adds and number is None and fields.has(flag):
            raise fields.fault(f"{which}_token_id", f"is missing, but {PREFIX}{flag} is true")
        around.append((tokens[number], number) if adds and number is not None else None)
    return post_processor(*around)


def _ends(tokens: list[str], types: list[int], named: Collection[int | None]) -> tuple[int, ...]:
    known = [n for n, (token, kind) in enumerate(zip(tokens, types, strict=True)) if _is_end(token, kind)]
    ids = dict.fromkeys([*(number for number in named if number is not None), *known])
    texts = {tokens[number] for number in ids}
    return tuple(number for number in ids if not (texts >= _HARMONY and tokens[number] == "<|end|>"))


def _is_end(token: str, kind: int) -> bool:
    return kind != UNUSED and token in _END_TEXTS


def _context_length(metadata: Mapping[str, Any]) -> int | None:
    """Whatever the architecture is; the model's config checks the value."""
    architecture = metadata.get("general.architecture")
    value = metadata.get(f"{architecture}.context_length") if isinstance(architecture, str) else None
    return value if type(value) is int and value > 0 else None


def _chat_template(path: Path, metadata: Mapping[str, Any]) -> str | None:
    value = metadata.get("tokenizer.chat_template")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{path} is damaged: tokenizer.chat_template is {quoted(value)}, not a text; download it again"
        )
    return value
