"""The operations of `pallas_kernels` at decoding's shapes: operands, bytes, and expected results.

Experts can be measured at prompts' shapes too, and there with unbalanced routing as well; so can attention.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Final

from gptjax.bench.cases.attention import Attention
from gptjax.bench.cases.block import Block
from gptjax.bench.cases.case import Case, link
from gptjax.bench.cases.experts import Experts
from gptjax.bench.cases.prefill import Prefill
from gptjax.bench.cases.product import Product
from gptjax.config import GPT2Config, GptOssConfig, LlamaConfig, ModelConfig
from gptjax.config.quantization import packs
from pallas_kernels.block.stream import PANEL

__all__ = ["OPERATIONS", "Attention", "Block", "Case", "Experts", "Prefill", "Product", "cases", "link"]

OPERATIONS: Final = tuple(case.operation for case in (Experts, Product, Attention, Block, Prefill))
_ROW_COUNTS: Final = {"moe": (1, 8, 32, 128), "matvec": (1, 8, 32)}
_PROMPTS: Final = (512, 2048, 16384)  # rows of prompts; from the first on, experts are also measured unbalanced
_CACHES: Final = {  # rows and positions
    "attention": ((1, 512), (1, 2048), (1, 32768), (8, 512), (8, 2048), (32, 512)),
    "block": ((1, 512), (8, 512)),
}
_WINDOWS: Final = (1, 8, 32)  # rows
_READ: Final = ((1, 512, 0), (1, 2048, 0), (4, 512, 0), (1, 2048, 30720))  # rows, tokens of each, positions before them


def cases(
    models: Mapping[str, ModelConfig],
    *,
    dtype: str,
    operations: Collection[str] = OPERATIONS,
    rows: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    prompts: bool = False,
    cache_dtype: str | None = None,
) -> dict[Case, list[str]]:
    """The cases that models use, each with the names of those models, in the order of OPERATIONS.

    Args:
      rows, positions: replace the default ones.
      prompts: also measure experts at prompts' numbers of rows, and attention of prompts.
      cache_dtype: of keys and values in attention: "fp8"; None: `dtype`.
    """
    found: dict[Case, list[str]] = {}
    for operation in (each for each in OPERATIONS if each in operations):
        for name, config in models.items():
            if operation == Prefill.operation:
                for case in _prefill(config, dtype, cache_dtype, rows, positions) if prompts else ():
                    found.setdefault(case, []).append(name)
                continue
            counts = rows or _ROW_COUNTS.get(operation, _WINDOWS)
            if prompts and rows is None and operation == Experts.operation:
                counts = (*counts, *_PROMPTS)
            caches = _CACHES.get(operation, ())
            if rows or positions:
                caches = tuple((B, S) for B in rows or [1] for S in positions or [512])
            for case in _of(operation, config, dtype, cache_dtype, counts, caches):
                found.setdefault(case, []).append(name)
    return found


def _of(
    operation: str,
    config: ModelConfig,
    dtype: str,
    cache_dtype: str | None,
    counts: Sequence[int],
    caches: Sequence[tuple[int, int]],
) -> list[Case]:
    D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_width
    has_experts = isinstance(config, GptOssConfig)
    if operation == "matvec":
        sizes = [(D, (N + 2 * K) * H), (N * H, D)]
        ups = 2 if isinstance(config, LlamaConfig) else 1  # gate and up
        sizes += [] if has_experts else [(D, ups * config.mlp_width), (config.mlp_width, D)]
        head = (D, config.vocab_size)
        return [Product(rows, dtype, *size, transposed=size is head) for size in [*sizes, head] for rows in counts]
    fits = [(rows, positions) for rows, positions in caches if positions <= config.context_length]
    if operation == "attention":
        full = partial(Attention, dtype=dtype, num_heads=N, num_kv_heads=K, head_width=H, sinks=has_experts)
        full = partial(full, cache_dtype=cache_dtype)
        windows = sorted({window for window in config.windows if window is not None})
        return [
            *(full(rows=rows, positions=positions, windowed=False) for rows, positions in fits),
            *(full(rows=rows, positions=size, windowed=True) for size in windows for rows in counts),
        ]
    if operation == "block":
        if not isinstance(config, GPT2Config) or not _has_block(config):
            return []
        block = partial(
            Block, dtype=dtype, num_heads=N, head_width=H, mlp_width=config.mlp_width, epsilon=config.norm_epsilon
        )
        return [block(rows=rows, positions=positions) for rows, positions in fits]
    if not isinstance(config, GptOssConfig):
        return []
    settings = config.num_experts, config.experts_per_token, packs(config.mxfp4, "experts")
    activation = config.swiglu_alpha, config.swiglu_limit
    experts = [Experts(rows, dtype, D, config.mlp_width, *settings, *activation) for rows in counts]
    return [*experts, *(dataclasses.replace(each, balanced=False) for each in experts if each.rows >= _PROMPTS[0])]


def _prefill(
    config: ModelConfig,
    dtype: str,
    cache_dtype: str | None,
    rows: Sequence[int] | None,
    positions: Sequence[int] | None,
) -> list[Case]:
    """Prompts; given any, of so many rows of so many positions."""
    prefill = partial(
        Prefill,
        dtype=dtype,
        cache_dtype=cache_dtype,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_width=config.head_width,
        sinks=isinstance(config, GptOssConfig),
    )
    read = [(B, T, 0) for B in rows or [1] for T in positions or [512]] if rows or positions else _READ
    windows = sorted(set(config.windows), key=lambda window: window or config.context_length)
    return [
        prefill(rows=B, tokens=T, prior=prior, window=window)
        for B, T, prior in read
        if prior + T <= config.context_length
        for window in windows
    ]


def _has_block(config: GPT2Config) -> bool:
    """Whether `block` supports this model's blocks."""
    return config.activation == "gelu_tanh" and config.head_width == PANEL and not packs(config.mxfp4, "linear")
