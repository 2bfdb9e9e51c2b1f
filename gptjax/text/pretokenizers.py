"""What a GGUF file's `tokenizer.ggml.pre` stands for: how text is cut into words before a byte-level BPE merges them.

GGUF has only a name; llama.cpp's src/llama-vocab.cpp says which expressions it means. Here are the parts of the
tokenizer.json that each was converted from, because llama.cpp rewrites some expressions for its own matcher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2: Final = {**_BYTES, "use_regex": True}
_DIGITS: Final = {"type": "Digits", "individual_digits": True}
_NFC: Final = {"type": "NFC"}

_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH: Final = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_WORDS: Final = (  # "Word" and "WORD": from an upper to a lower case begins no new word, back it does
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_LLAMA3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_O200K: Final = "|".join([*(f"{word}{_CONTRACTIONS}?" for word in _WORDS), r"\p{N}{1,3}", _REST_WITH_SLASH])
_TEKKEN: Final = "|".join([*_WORDS, r"\p{N}", _REST_WITH_SLASH])


@dataclass(frozen=True, slots=True)
class Cut:
    """A pre-tokenizer, with what goes along with its name."""

    pre_tokenizer: Mapping[str, Any]
    """As in tokenizer.json, like `normalizer`."""
    normalizer: Mapping[str, Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False
    """Whether a text begins with a BOS if the file does not say."""


def _sequence(*parts: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _split(expression: str) -> Mapping[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


_LLAMA3_CUT: Final = Cut(_sequence(_split(_LLAMA3), _BYTES), ignore_merges=True, add_bos=True)
_QWEN2_CUT: Final = Cut(_sequence(_split(_QWEN2), _BYTES), _NFC)
_DIGITS_CUT: Final = Cut(_sequence(_DIGITS, _GPT2))
_DEEPSEEK_CODER: Final = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")

CUTS: Final[Mapping[str, Cut]] = {
    "gpt-2": Cut(_GPT2),
    "gpt-4o": Cut(_sequence(_split(_O200K), _BYTES), ignore_merges=True),
    "llama-bpe": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "qwen2": _QWEN2_CUT,
    "deepseek-r1-qwen": _QWEN2_CUT,
    "smollm": _DIGITS_CUT,
    "starcoder": _DIGITS_CUT,
    "refact": _DIGITS_CUT,
    "tekken": Cut(_sequence(_split(_TEKKEN), _BYTES), ignore_merges=True, add_bos=True),
    "deepseek-coder": Cut(_sequence(*map(_split, _DEEPSEEK_CODER), _DIGITS, _BYTES)),
}
