"""The published sizes, by name: what can be described and measured without a checkpoint."""

from collections.abc import Mapping
from typing import Final

from gptjax.config import gpt2, gpt_oss
from gptjax.config.gpt2 import GPT2Config
from gptjax.config.gpt_oss import GptOssConfig
from gptjax.config.llama import FAMILIES, LlamaConfig
from gptjax.config.rope import Llama3, Rope
from gptjax.errors import RequestError
from gptjax.support.quoting import quoted

ModelConfig = GPT2Config | GptOssConfig | LlamaConfig


def _llama(
    family: str,
    *,
    vocab_size: int,
    context_length: int,
    num_layers: int,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_width: int,
    rope: Rope,
    head_width: int | None = None,
    window: int | None = None,
    norm_epsilon: float = 1e-5,
    tied_head: bool = False,
) -> LlamaConfig:
    """A published size without optional biases. The head's width is the width divided among the heads, if not given."""
    return LlamaConfig(
        family=family,
        vocab_size=vocab_size,
        context_length=context_length,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=head_width or width // num_heads,
        mlp_width=mlp_width,
        windows=(window,) * num_layers,
        rope=rope,
        norm_epsilon=norm_epsilon,
        qkv_bias=FAMILIES[family].qkv_bias,
        out_bias=False,
        mlp_bias=False,
        qk_norm=FAMILIES[family].qk_norm,
        tied_head=tied_head,
    )


def _llama3_rope(factor: float) -> Rope:
    return Rope(500000.0, Llama3(factor, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0))


PUBLISHED: Final[Mapping[str, ModelConfig]] = {
    "gpt2": gpt2.published(num_layers=12, num_heads=12, width=768),
    "gpt2-medium": gpt2.published(num_layers=24, num_heads=16, width=1024),
    "gpt2-large": gpt2.published(num_layers=36, num_heads=20, width=1280),
    "gpt2-xl": gpt2.published(num_layers=48, num_heads=25, width=1600),
    "gpt-oss-20b": gpt_oss.published(num_layers=24, num_experts=32),
    "gpt-oss-120b": gpt_oss.published(num_layers=36, num_experts=128),
    "llama-2-7b": _llama(
        "llama",
        vocab_size=32000,
        context_length=4096,
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=32,
        mlp_width=11008,
        rope=Rope(10000.0),
    ),
    "llama-3.1-8b": _llama(
        "llama",
        vocab_size=128256,
        context_length=131072,
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=14336,
        rope=_llama3_rope(8.0),
    ),
    "llama-3.2-1b": _llama(
        "llama",
        vocab_size=128256,
        context_length=131072,
        num_layers=16,
        width=2048,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=8192,
        rope=_llama3_rope(32.0),
        tied_head=True,
    ),
    "smollm2-135m": _llama(
        "llama",
        vocab_size=49152,
        context_length=8192,
        num_layers=30,
        width=576,
        num_heads=9,
        num_kv_heads=3,
        mlp_width=1536,
        rope=Rope(100000.0),
        tied_head=True,
    ),
    "mistral-7b": _llama(
        "mistral",
        vocab_size=32000,
        context_length=32768,
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=14336,
        rope=Rope(10000.0),
        window=4096,
    ),
    "qwen2.5-0.5b": _llama(
        "qwen2",
        vocab_size=151936,
        context_length=32768,
        num_layers=24,
        width=896,
        num_heads=14,
        num_kv_heads=2,
        mlp_width=4864,
        rope=Rope(1000000.0),
        norm_epsilon=1e-6,
        tied_head=True,
    ),
    "qwen2.5-7b": _llama(
        "qwen2",
        vocab_size=152064,
        context_length=32768,
        num_layers=28,
        width=3584,
        num_heads=28,
        num_kv_heads=4,
        mlp_width=18944,
        rope=Rope(1000000.0),
        norm_epsilon=1e-6,
    ),
    "qwen3-0.6b": _llama(
        "qwen3",
        vocab_size=151936,
        context_length=40960,
        num_layers=28,
        width=1024,
        num_heads=16,
        num_kv_heads=8,
        head_width=128,
        mlp_width=3072,
        rope=Rope(1000000.0),
        norm_epsilon=1e-6,
        tied_head=True,
    ),
    "qwen3-8b": _llama(
        "qwen3",
        vocab_size=151936,
        context_length=40960,
        num_layers=36,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        head_width=128,
        mlp_width=12288,
        rope=Rope(1000000.0),
        norm_epsilon=1e-6,
    ),
}


def published(name: str) -> ModelConfig:
    """The configuration of a published size, such as "gpt2-xl". Raises `RequestError`."""
    if name not in PUBLISHED:
        raise RequestError(f"unknown size {quoted(name)}; choose one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]
