"""Small tokenizers with the structure of published ones: the demo's vocabulary, cut as their tokenizer.json says.

The structures are those of the tokenizer.json in these Hugging Face repositories, whose expressions are quoted in full.
"""

import copy
from typing import Any

from tests.text.text_material import demo_json, with_added

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
EXPRESSIONS = {
    # meta-llama/Meta-Llama-3-8B
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen/Qwen2-7B, the same in Qwen2.5 and Qwen3
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # openai/gpt-oss-20b
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # mistralai/Mistral-Nemo-Base-2407
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# deepseek-ai/deepseek-llm-7b-base
DEEPSEEK_LLM = [
    r"[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ"
    r"-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-"
    r"ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
]
TEXTS = [
    *(
        "",
        " ",
        "  ",
        "\n",
        " \n\n\t \r\n x",
        "Hello, World!",
        "I'VE we'll 'Twas IT'S they'd've",
        "camelCase HTTPServer ǅabc",
    ),
    *(
        "1 12 123 1234 12345 x1y22z333",
        "½ ² ५६७ Ⅻ ٣",
        "if (a==b) {\n\treturn -1; // no/\n}\n\n",
        "e\u0301 é ﬁ Å",
        "日本語のテスト。",
    ),
    *(
        "🐲🦙 😶‍🌫️ ok",
        "a\u00a0b\u3000c",
        "<|im_start|>user\nhi<|im_end|>",
        "<s></s> <|begin_of_text|>",
        "   leading and   inner   ",
    ),
    *("Нещо на Български", "ក្រុមហ៊ុន", "......!!!!???", "x" * 50, "\x7f\x01"),
]


def _file(pre_tokenizer: dict[str, Any], special: list[str], **more: Any) -> dict[str, Any]:
    file = with_added(copy.deepcopy(demo_json()), special)
    return {**file, "pre_tokenizer": pre_tokenizer, **more}


def _cut(*expressions: str, more: list[dict[str, Any]]) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False} for each in expressions
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, *more]}


def _split(name: str) -> dict[str, Any]:
    return _cut(EXPRESSIONS[name], more=[BYTES])


def _begins_with(token: str, number: int) -> dict[str, Any]:
    """Llama 3's post_processor, whose second part adds the BOS."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"type": "Sequence", "processors": [level, template]}


def family() -> dict[str, dict[str, Any]]:
    """A tokenizer.json by the name that `tokenizer.ggml.pre` has for it."""
    llama3 = _file(
        _split("llama-bpe"),
        ["<|begin_of_text|>", "<|eot_id|>"],
        post_processor=_begins_with("<|begin_of_text|>", 8192),
    )
    tekken = _file(_split("tekken"), ["[INST]"], post_processor=_begins_with("<|endoftext|>", 8191))
    for file in (llama3, tekken):
        file["model"] = {**file["model"], "ignore_merges": True}
    level = {**BYTES, "use_regex": True}
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    return {
        "gpt-2": _file(level, []),
        "llama-bpe": llama3,
        "qwen2": _file(_split("qwen2"), ["<|im_start|>", "<|im_end|>"], normalizer={"type": "NFC"}),
        "smollm": _file(digits, ["<|im_start|>", "<|im_end|>"]),
        "gpt-4o": _file(_split("gpt-4o"), ["<|start|>"]),
        "tekken": tekken,
        "deepseek-llm": _file(_cut(*DEEPSEEK_LLM, more=[{"type": "Digits", "individual_digits": True}, BYTES]), []),
    }


def gguf_metadata(file: dict[str, Any], pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes for a byte-level tokenizer.json, as a plain mapping."""
    tokens = dict(sorted((number, token) for token, number in file["model"]["vocab"].items()))
    types = dict.fromkeys(tokens, 1)
    for token in file["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], 3 if token["special"] else 4
    return {
        "general.architecture": "llama",
        "llama.context_length": 77,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens[number] for number in sorted(tokens)],
        "tokenizer.ggml.token_type": [types[number] for number in sorted(tokens)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in file["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 8192 if pre == "llama-bpe" else 8191,
        "tokenizer.ggml.eos_token_id": 8191,
    }
