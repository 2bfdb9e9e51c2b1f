"""Which kind of tokenizer a tokenizer.json describes; any other than these two is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gptjax.errors import ConfigError
from gptjax.support.quoting import quoted, shown
from gptjax.text.growth import MOST_GROWTH, growth
from gptjax.text.spelling import BYTE_LEVEL, SENTENCEPIECE, SPACE, Spelling

PREPEND: Final = {"type": "Prepend", "prepend": SPACE}
REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DECODER: Final = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP: Final = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
BYTE_LEVEL_DECODER: Final = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
# What SentencePiece's remove_extra_whitespaces does: no spaces at either end, and one in place of several.
EXTRA_SPACES: Final = (
    {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
)
_AFFIXES: Final = ("continuing_subword_prefix", "end_of_word_suffix")


def spelling_of(path: Path, found: dict[str, Any], model: dict[str, Any]) -> Spelling:
    """The spelling of a tokenizer.json, whose "model" is `model`. Raises ConfigError for any other kind."""
    if model.get("byte_fallback") is True and "ByteLevel" not in _types(found.get("pre_tokenizer")):
        spelling, name, faults = (
            SENTENCEPIECE,
            "SentencePiece BPE as Llama 2 has it",
            _sentencepiece_faults(found, model),
        )
    else:
        spelling, name, faults = BYTE_LEVEL, "byte-level BPE", _byte_level_faults(found, model)
    if faults:
        raise ConfigError(
            f"{path} is not a {name} ({', '.join(faults[:10])}), and gptjax reads byte-level and SentencePiece BPE "
            "only: use a model that has one, or give token ids instead of text"
        )
    return spelling


def parts(node: Any, key: str) -> list[Any]:
    """The members of a Sequence, which are under `key`, or the node itself; none for None."""
    if isinstance(node, dict) and node.get("type") == "Sequence" and isinstance(node.get(key), list):
        return list(node[key])
    return [] if node is None else [node]


def strips_space(found: dict[str, Any]) -> bool:
    """Whether the decoder of a SentencePiece tokenizer leaves out the space that a text begins with."""
    return _STRIP in parts(found.get("decoder"), "decoders")


def sentencepiece_decoder(*, strips_space: bool) -> dict[str, Any]:
    """The decoder of a SentencePiece tokenizer."""
    return {"type": "Sequence", "decoders": [*_DECODER, _STRIP] if strips_space else _DECODER}


def adds_space(found: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    cuts = parts(found.get("pre_tokenizer"), "pretokenizers")
    schemes = [cut.get("prepend_scheme", "always" if cut.get("add_prefix_space", True) else "never") for cut in cuts]
    return PREPEND in parts(found.get("normalizer"), "normalizers") or any(scheme != "never" for scheme in schemes)


def _byte_level_faults(found: dict[str, Any], model: dict[str, Any]) -> list[str]:
    faults = _model_faults(model)
    levels = list(_types(found.get("pre_tokenizer"))).count("ByteLevel")
    if not levels:
        faults.append("its pre_tokenizer is not ByteLevel")
    elif levels > 1:
        faults.append("it has several ByteLevel pre_tokenizers")
    if growth(found.get("normalizer")) > MOST_GROWTH:
        faults.append(f"its normalizer can make a text more than {MOST_GROWTH} times as long")
    if model.get("byte_fallback"):
        faults.append(f"it has byte_fallback {quoted(model['byte_fallback'])}")
    return faults + [
        f"its decoder is {shown(kind)}"
        for kind in _types(found.get("decoder"))
        if kind not in ("ByteLevel", "Sequence")
    ]


def _sentencepiece_faults(found: dict[str, Any], model: dict[str, Any]) -> list[str]:
    faults = _model_faults(model)
    if model.get("ignore_merges"):
        faults.append(f"it has ignore_merges {quoted(model['ignore_merges'])}")
    normalizers = parts(found.get("normalizer"), "normalizers")
    faults += [
        f"its normalizer is {quoted(each)}" for each in normalizers if each not in (PREPEND, REPLACE, *EXTRA_SPACES)
    ]
    cuts = parts(found.get("pre_tokenizer"), "pretokenizers")
    faults += [f"its pre_tokenizer is {quoted(each)}" for each in cuts if not _is_metaspace(each)]
    if REPLACE not in normalizers and not cuts:
        faults.append(f"nothing replaces its spaces by {SPACE}")
    if len(cuts) > 1:
        faults.append("it has several pre_tokenizers")
    if parts(found.get("decoder"), "decoders") not in (_DECODER, [*_DECODER, _STRIP]):
        faults.append(f"its decoder is {quoted(found.get('decoder'))}")
    vocab = model.get("vocab")
    if isinstance(vocab, dict) and (missing := SENTENCEPIECE.missing(vocab)):
        faults.append(f"it has no token for the bytes {quoted(sorted(missing))}")
    return faults


def _model_faults(model: dict[str, Any]) -> list[str]:
    """Older files omit the model's type, and write an absent affix as ""."""
    kind = model.get("type", "BPE" if "merges" in model else None)
    faults = [] if kind == "BPE" else [f"its model is {shown(str(kind))}"]
    return faults + [f"it has {key} {quoted(model[key])}" for key in _AFFIXES if model.get(key)]


def _is_metaspace(cut: Any) -> bool:
    return isinstance(cut, dict) and cut.get("type") == "Metaspace" and cut.get("replacement") == SPACE


def _types(node: Any) -> Iterator[str]:
    """The values of all "type" keys in a part of tokenizer.json."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("type"), str):
                yield node["type"]
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
