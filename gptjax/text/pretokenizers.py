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
_CHINESE: Final = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK_CODER: Final = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE)
# The letters with cases of an older Unicode, without a few scripts.
_CASED: Final = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM: Final = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CHINESE,
)

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
    "deepseek-llm": Cut(_sequence(*map(_split, _DEEPSEEK_LLM), _DIGITS, _BYTES)),
    "deepseek-coder": Cut(_sequence(*map(_split, _DEEPSEEK_CODER), _DIGITS, _BYTES)),
}
