"""GPT-2's tensors, named as in openai/gpt-2's files and by transformers' `GPT2LMHeadModel.save_pretrained`.

Conv1D weights are stored [in, out], like kernels here, so nothing is transposed.
"""

from collections.abc import Collection

from convert.heads import other_heads
from convert.rules import Copy, Ignored, Rule, Table
from gptjax.config import GPT2Config

_BLOCKS = (
    Rule("[transformer.]h.{N}.ln_1.weight", "block_{N}/attention_norm/scale"),
    Rule("[transformer.]h.{N}.ln_1.bias", "block_{N}/attention_norm/bias"),
    Rule("[transformer.]h.{N}.attn.c_attn.weight", "block_{N}/attention/qkv/kernel"),
    Rule("[transformer.]h.{N}.attn.c_attn.bias", "block_{N}/attention/qkv/bias"),
    Rule("[transformer.]h.{N}.attn.c_proj.weight", "block_{N}/attention/out/kernel"),
    Rule("[transformer.]h.{N}.attn.c_proj.bias", "block_{N}/attention/out/bias"),
    Rule("[transformer.]h.{N}.ln_2.weight", "block_{N}/mlp_norm/scale"),
    Rule("[transformer.]h.{N}.ln_2.bias", "block_{N}/mlp_norm/bias"),
    Rule("[transformer.]h.{N}.mlp.c_fc.weight", "block_{N}/mlp/up/kernel"),
    Rule("[transformer.]h.{N}.mlp.c_fc.bias", "block_{N}/mlp/up/bias"),
    Rule("[transformer.]h.{N}.mlp.c_proj.weight", "block_{N}/mlp/down/kernel"),
    Rule("[transformer.]h.{N}.mlp.c_proj.bias", "block_{N}/mlp/down/bias"),
)
_EMBEDDING = Rule("[transformer.]wte.weight", "token_embedding")
_ENDS = (
    Rule("[transformer.]wpe.weight", "position_embedding"),
    Rule("[transformer.]ln_f.weight", "final_norm/scale"),
    Rule("[transformer.]ln_f.bias", "final_norm/bias"),
)
_HEAD = Rule(
    "lm_head.weight",
    "head_embedding",
    if_missing="or set tie_word_embeddings to true in config.json if the model was trained with a tied head",
)
_TIED_HEAD = Copy(
    "lm_head.weight",
    "[transformer.]wte.weight",
    otherwise="the head is not tied to the embedding: set tie_word_embeddings to false in config.json",
)
_HEAD_AS_EMBEDDING = Rule("lm_head.weight", "token_embedding")
_BUFFERS = (
    Ignored("[transformer.]h.{N}.attn.bias", "the causal mask, a buffer"),
    Ignored("[transformer.]h.{N}.attn.masked_bias", "the value of masked scores, a buffer"),
)


def table(config: GPT2Config, names: Collection[str]) -> Table:
    """The table for a model with or without a tied head.

    A tied model's one tensor can be stored under either name: transformers keeps the embedding's, safetensors'
    `save_model` the alphabetically first, lm_head.weight.
    """
    ignored, refused = other_heads(names, "GPT2LMHeadModel")
    body = (*_ENDS, *_BLOCKS)
    if not config.tied_head:
        return Table((_EMBEDDING, *body, _HEAD), (*_BUFFERS, *ignored), refused=refused)
    if "lm_head.weight" in names and not {"wte.weight", "transformer.wte.weight"} & set(names):
        return Table((_HEAD_AS_EMBEDDING, *body), (*_BUFFERS, *ignored), refused=refused)
    return Table((_EMBEDDING, *body), (*_BUFFERS, *ignored), (_TIED_HEAD,), refused)
