"""Hand-made hostile files of settings, each with its expected error."""

from typing import Any

from tests.hostile import formats
from tests.hostile.rows import DEEP, LFS, Make, Row, put
from tests.oracles import gpt2_random, gpt_oss_random, llama_random


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
