"""GPT-2's tensors, named as in openai/gpt-2's files and by transformers' `GPT2LMHeadModel.save_pretrained`.

Conv1D weights are stored [in, out], like kernels here, so nothing is transposed.
"""

from collections.abc import Collection

from convert.heads import with_ends
from convert.rules import Ignored, Rule, Table
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
_ENDS = (
    Rule("[transformer.]wpe.weight", "position_embedding"),
    Rule("[transformer.]ln_f.weight", "final_norm/scale"),
    Rule("[transformer.]ln_f.bias", "final_norm/bias"),
)
_BUFFERS = (
    Ignored("[transformer.]h.{N}.attn.bias", "the causal mask, a buffer"),
    Ignored("[transformer.]h.{N}.attn.masked_bias", "the value of masked scores, a buffer"),
)


def table(config: GPT2Config, names: Collection[str]) -> Table:
    """The table for a model with or without a tied head."""
    return with_ends(
        (*_ENDS, *_BLOCKS),
        names,
        embedding="[transformer.]wte.weight",
        tied=config.tied_head,
        model="GPT2LMHeadModel",
        buffers=_BUFFERS,
    )
