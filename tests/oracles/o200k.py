"""GPT-OSS's vocabulary, unpacked into the files that openai-harmony and gptjax read."""

import base64
import json
import lzma
from pathlib import Path

from gptjax.text.spelling import BYTE_LEVEL

SOURCE = Path(__file__).resolve().parents[1] / "data" / "o200k_harmony" / "o200k_base.tiktoken.xz"
# openai/harmony `src/tiktoken_ext/public_encodings.rs`, and the reserved ones of GPT-OSS's tokenizer.json.
SPECIAL = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORDS = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTED}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTED}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def write(directory: Path) -> Path:
    """Writes o200k_base.tiktoken and tokenizer.json into `directory`."""
    listed = lzma.decompress(SOURCE.read_bytes())
    (directory / "o200k_base.tiktoken").write_bytes(listed)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, listed.splitlines())}
    letters = BYTE_LEVEL.byte_tokens
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # tiktoken merges any two neighbours that make a token, the lowest rank first.
    merges = [
        [spelled[token[:cut]], spelled[token[cut:]]]
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {token_id: SPECIAL.get(token_id, f"<|reserved_{token_id}|>") for token_id in range(199998, 200019)}
    file = {
        "added_tokens": [{"id": token_id, "content": content, **flags} for token_id, content in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {
            "type": "BPE",
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": merges,
            "ignore_merges": True,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return directory
