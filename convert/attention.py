"""What the tables of GPT-OSS and Llama have in common: transformers' names of attention and of norms.

Linear weights are stored [out, in]; kernels here are [in, out].
"""

from convert.rules import TRANSPOSED, Rule, stacked, stacked_transposed
from gptjax.config import GptOssConfig, LlamaConfig

LAYER = "model.layers.{N}"
EMBEDDING = "model.embed_tokens.weight"


def attention(config: GptOssConfig | LlamaConfig) -> tuple[Rule, ...]:
    """The rules for attention, the norm before it, and the final norm; q, k and v become one weight."""
    sizes = [heads * config.head_width for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    weights, biases = (tuple(f"{LAYER}.self_attn.{part}_proj.{kind}" for part in "qkv") for kind in ("weight", "bias"))
    return (
        Rule("model.norm.weight", "final_norm/scale"),
        Rule(f"{LAYER}.input_layernorm.weight", "block_{N}/attention_norm/scale"),
        Rule(weights, "block_{N}/attention/qkv/kernel", stacked_transposed(sizes)),
        Rule(biases, "block_{N}/attention/qkv/bias", stacked(sizes)),
        Rule(f"{LAYER}.self_attn.o_proj.weight", "block_{N}/attention/out/kernel", TRANSPOSED),
        Rule(f"{LAYER}.self_attn.o_proj.bias", "block_{N}/attention/out/bias"),
    )
