"""The tensors of Llama and its relatives, named as by transformers. Gate and up become one weight, as q, k and v do."""

from collections.abc import Collection

from convert.attention import EMBEDDING, LAYER, attention
from convert.heads import with_ends
from convert.rules import TRANSPOSED, Ignored, Rule, Table, stacked, stacked_transposed
from gptjax.config import LlamaConfig
from gptjax.config.llama import FAMILIES

_GATE_UP = tuple(f"{LAYER}.mlp.{part}_proj" for part in ("gate", "up"))
_BLOCKS = (
    Rule(f"{LAYER}.self_attn.q_norm.weight", "block_{N}/attention/q_norm/scale"),
    Rule(f"{LAYER}.self_attn.k_norm.weight", "block_{N}/attention/k_norm/scale"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "block_{N}/mlp_norm/scale"),
    Rule(f"{LAYER}.mlp.down_proj.weight", "block_{N}/mlp/down/kernel", TRANSPOSED),
    Rule(f"{LAYER}.mlp.down_proj.bias", "block_{N}/mlp/down/bias"),
)
_BUFFERS = (Ignored(f"{LAYER}.self_attn.rotary_emb.inv_freq", "the rotation's frequencies, a buffer"),)


def table(config: LlamaConfig, names: Collection[str]) -> Table:
    """The table for a model of any family."""
    sizes = [config.mlp_width] * 2
    gate_up = (
        Rule(tuple(f"{name}.weight" for name in _GATE_UP), "block_{N}/mlp/gate_up/kernel", stacked_transposed(sizes)),
        Rule(tuple(f"{name}.bias" for name in _GATE_UP), "block_{N}/mlp/gate_up/bias", stacked(sizes)),
    )
    return with_ends(
        (*attention(config), *gate_up, *_BLOCKS),
        names,
        embedding=EMBEDDING,
        tied=config.tied_head,
        model=FAMILIES[config.family].architecture,
        buffers=_BUFFERS,
    )
