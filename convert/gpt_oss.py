"""GPT-OSS's tensors, named as in Hugging Face's files and in OpenAI's original ones.

Linear weights are stored [out, in]; kernels here are [in, out]. MXFP4 blocks and scales are copied unchanged;
dequantised experts are already stored [in, out].
"""

import dataclasses
from collections.abc import Collection

from convert.attention import EMBEDDING, LAYER, attention
from convert.heads import with_ends
from convert.rules import IDENTITY, TRANSPOSED, Rule, Table
from gptjax.config import GptOssConfig
from pallas_kernels.formats.mxfp4 import NAN_SCALE

_BLOCKS = dataclasses.replace(IDENTITY, name="blocks", dtypes=("U8",))
_SCALES = dataclasses.replace(
    _BLOCKS,
    name="scales",
    fault=lambda array: f"the scale {NAN_SCALE}, which is NaN" if array.max(initial=0) == NAN_SCALE else "",
)
_NOT_PACKED = "or remove quantization_config from config.json if the experts are not in MXFP4"
_PACKED = "or add quantization_config (quant_method mxfp4) to config.json if the experts are in MXFP4"

_EXPERTS = (
    Rule(f"{LAYER}.mlp.experts.gate_up_proj_blocks", "block_{N}/moe/gate_up_kernel/blocks", _BLOCKS, _NOT_PACKED),
    Rule(f"{LAYER}.mlp.experts.gate_up_proj_scales", "block_{N}/moe/gate_up_kernel/scales", _SCALES, _NOT_PACKED),
    Rule(f"{LAYER}.mlp.experts.gate_up_proj", "block_{N}/moe/gate_up_kernel", if_missing=_PACKED),
    Rule(f"{LAYER}.mlp.experts.gate_up_proj_bias", "block_{N}/moe/gate_up_bias"),
    Rule(f"{LAYER}.mlp.experts.down_proj_blocks", "block_{N}/moe/down_kernel/blocks", _BLOCKS, _NOT_PACKED),
    Rule(f"{LAYER}.mlp.experts.down_proj_scales", "block_{N}/moe/down_kernel/scales", _SCALES, _NOT_PACKED),
    Rule(f"{LAYER}.mlp.experts.down_proj", "block_{N}/moe/down_kernel", if_missing=_PACKED),
    Rule(f"{LAYER}.mlp.experts.down_proj_bias", "block_{N}/moe/down_bias"),
)
_ROUTER = (
    Rule(f"{LAYER}.self_attn.sinks", "block_{N}/attention/sinks"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "block_{N}/moe_norm/scale"),
    Rule(f"{LAYER}.mlp.router.weight", "block_{N}/moe/router/kernel", TRANSPOSED),
    Rule(f"{LAYER}.mlp.router.bias", "block_{N}/moe/router/bias"),
)
_ORIGINAL = (
    Rule("embedding.weight", "token_embedding"),
    Rule("norm.scale", "final_norm/scale"),
    Rule("unembedding.weight", "head_embedding"),
    Rule("block.{N}.attn.norm.scale", "block_{N}/attention_norm/scale"),
    Rule("block.{N}.attn.qkv.weight", "block_{N}/attention/qkv/kernel", TRANSPOSED),
    Rule("block.{N}.attn.qkv.bias", "block_{N}/attention/qkv/bias"),
    Rule("block.{N}.attn.sinks", "block_{N}/attention/sinks"),
    Rule("block.{N}.attn.out.weight", "block_{N}/attention/out/kernel", TRANSPOSED),
    Rule("block.{N}.attn.out.bias", "block_{N}/attention/out/bias"),
    Rule("block.{N}.mlp.norm.scale", "block_{N}/moe_norm/scale"),
    Rule("block.{N}.mlp.gate.weight", "block_{N}/moe/router/kernel", TRANSPOSED),
    Rule("block.{N}.mlp.gate.bias", "block_{N}/moe/router/bias"),
    Rule("block.{N}.mlp.mlp1_weight.blocks", "block_{N}/moe/gate_up_kernel/blocks", _BLOCKS),
    Rule("block.{N}.mlp.mlp1_weight.scales", "block_{N}/moe/gate_up_kernel/scales", _SCALES),
    Rule("block.{N}.mlp.mlp1_bias", "block_{N}/moe/gate_up_bias"),
    Rule("block.{N}.mlp.mlp2_weight.blocks", "block_{N}/moe/down_kernel/blocks", _BLOCKS),
    Rule("block.{N}.mlp.mlp2_weight.scales", "block_{N}/moe/down_kernel/scales", _SCALES),
    Rule("block.{N}.mlp.mlp2_bias", "block_{N}/moe/down_bias"),
)


def table(config: GptOssConfig, names: Collection[str]) -> Table:
    """The table for the layout that these names show: OpenAI's or Hugging Face's."""
    if names and not any(name.startswith("model.") for name in names):
        return Table(_ORIGINAL)
    return with_ends(
        (*attention(config), *_ROUTER, *_EXPERTS),
        names,
        embedding=EMBEDDING,
        tied=config.tied_head,
        model="GptOssForCausalLM",
    )
