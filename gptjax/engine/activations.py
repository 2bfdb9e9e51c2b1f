"""The temporary memory of a step, and the bytes of weights, computed from a model's declared shapes."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import GPT2Config, GptOssConfig, LlamaConfig, ModelConfig
from gptjax.config.quantization import packs
from gptjax.engine import steps
from gptjax.layers.cache import capacity_of
from gptjax.layers.weight import AT_ONCE
from gptjax.models.params import abstract_params
from gptjax.models.registry import Model
from pallas_kernels import same_bits
from pallas_kernels.attention.decode import lanes
from pallas_kernels.attention.reference import DENSE_SCORES
from pallas_kernels.moe.reference import TOGETHER, group_sizes
from pallas_kernels.pages import PAGE, TILE

_FIXED = {"cpu": 1 << 20}  # bytes of a program's constants and small buffers; elsewhere also the libraries' workspaces
_FIXED_ELSEWHERE = 64 << 20
_WIDTHS = 64, 128  # of heads, that kernels for decoding and for prompts both take


def activations(model: Model, *, batch: int, max_length: int, platform: str) -> int:
    """The most temporary bytes that prefill or decoding needs: what XLA calls temporary buffers.

    With T the largest prompt chunk, in float32 (though XLA may keep some of it narrower or not at all):

        4·T·(q, k, v and residual (N + 2K)·H + the larger of the MLP's 2·F (3·F if it is gated; for experts, see `_moe`)
             and attention's 5·N·H + 2·D and 2·N·128 scores, on a CPU for at least 128 queries)
             (on a CPU in float32, if keys are not shared, a decode step has `lanes.numbers_of_a_row` instead, if more)
             (on a CPU in float32, an MLP without experts also has a D for each run that its second product adds up, if
             there are several: see `same_bits`)
        or, off the CPU, 2 · 4·B·N·T·S scores of any prompt or decode step with B·N·T·S at most 2^26, if more
             (and if keys and values are in float8, those in all pages of these rows, as they are and expanded; where
             there are kernels, of one row)
        + 8 · 4·B·V, the sampler's sorts and copies of all logits
        + the numbers of the largest packed weight that is unpacked as a whole, or on a CPU of 2^18 at a time
        + 1 MiB (64 MiB off the CPU, for the workspaces of matrix products)
        + on a CPU in half precision, the weights in float32: XLA has no half-precision products there and converts
          them; in float32, the matrices whose outputs are padded: see `same_bits`

    A test checks that it is at least what XLA reports and at most four times that (plus the workspaces). For its
    result, `LanguageModel.logits` needs another 4·T·V, and `LanguageModel.activations` all that it returns.
    """
    config = _own(model)
    longest = min(max_length, steps.chunk_of(model))
    lengths = (longest, *(1 << power for power in range(longest.bit_length())))
    buckets = {steps.chunks(length, steps.chunk_of(model))[0][2] for length in lengths}
    T = max(buckets)
    projected = (config.num_heads + 2 * config.num_kv_heads) * config.head_width
    S = capacity_of(max_length)
    scored = config.num_heads * (2 * PAGE + 5 * config.head_width)
    queries = max(T, TILE) if platform == "cpu" else T
    attention = 4 * queries * (scored + 2 * config.width)
    mlp = _moe(config, T) if isinstance(config, GptOssConfig) else 4 * T * _mlp(model, platform)
    if platform == "cpu" and jnp.dtype(model.dtype) == jnp.float32 and config.num_heads == config.num_kv_heads:
        expands = model.cache_dtype is not None
        numbers = lanes.numbers_of_a_row(config.num_heads, config.head_width, expands=expands)
        attention = max(attention, 4 * batch * numbers)
    chunk = 4 * T * projected + max(mlp, attention)
    if platform != "cpu":
        calls = [(size, -(-size // TILE)) for size in buckets] + [(batch, batch)]  # queries, and rows of pages
        at_once = [each for each in calls if config.num_heads * each[0] * S <= DENSE_SCORES]
        chunk = max([chunk, *(8 * config.num_heads * queries * S for queries, _ in at_once)])
        if model.cache_dtype is not None:
            number = 1 + jnp.dtype(model.dtype).itemsize
            by_kernels = steps.has_kernels_for_prompts(model) and config.head_width in _WIDTHS
            rows = 1 if by_kernels else max([1, *(rows for _, rows in at_once)])
            chunk += 2 * rows * S * config.num_kv_heads * config.head_width * number
    estimate = chunk + 32 * batch * config.vocab_size + _unpacked(config, platform)
    estimate += _FIXED.get(platform, _FIXED_ELSEWHERE)
    if model.own.mesh is not None:  # what the devices tell each other
        estimate += 4 * T * config.width * (2 + max(map(model.own.parts, "NFE")))
    if platform == "cpu":
        half = jnp.dtype(model.dtype).itemsize < 4
        estimate += 4 * (weight_bytes(model)[2] if half else config.num_layers * _padded(config))
    return estimate


def _own(model: Model) -> ModelConfig:
    """The configuration with the sizes of a device's share, where they divide temporary memory."""
    own = model.own
    sizes: dict[str, Any] = {"mlp_width": own.mlp_width}
    if not isinstance(model.config, GPT2Config):  # whose heads cannot be fewer without being wider
        sizes |= {"num_heads": own.num_heads, "num_kv_heads": own.num_kv_heads}
    if isinstance(model.config, GptOssConfig):
        sizes |= {"num_experts": own.num_experts}
    return dataclasses.replace(model.config, **sizes)


def _padded(config: ModelConfig) -> int:
    """The numbers of a layer's matrices that a CPU pads, as their outputs are no multiple of `same_bits.LANES`."""
    D, F = config.width, config.mlp_width
    heads = config.num_heads * config.head_width
    sizes = [(D, heads + 2 * config.num_kv_heads * config.head_width), (heads, D)]
    if not isinstance(config, GptOssConfig):
        sizes += [(D, _up(config)), (F, D)]
    multiple = same_bits.LANES
    return sum(inputs * -(-outputs // multiple) * multiple for inputs, outputs in sizes if outputs % multiple)


def _mlp(model: Model, platform: str) -> int:
    """Temporary numbers of an MLP without experts for each token: the results of both products."""
    config = _own(model)
    numbers = _up(config) + config.mlp_width
    runs = same_bits.runs(config.mlp_width)
    in_runs = platform == "cpu" and jnp.dtype(model.dtype) == jnp.float32 and runs > 1
    return numbers + config.width * runs if in_runs else numbers


def _moe(config: GptOssConfig, T: int) -> int:
    """Temporary bytes of the experts: four results for each pair of a token and an expert, three of them with padding,
    and the unpacked weights and hidden values of the groups that are computed together."""
    E, pairs = config.num_experts, T * config.experts_per_token
    group, groups = group_sizes(pairs, E)
    together = min(TOGETHER, groups)
    unpacked = 3 * config.width * config.mlp_width * (2 if config.mxfp4 != "none" else 1)
    return 4 * (
        (3 * group * groups + pairs) * config.width
        + together * (unpacked + group * (6 * config.mlp_width + config.width))
    )


def _up(config: ModelConfig) -> int:
    """The outputs of the MLP's first product: F, or gate and up."""
    return 2 * config.mlp_width if isinstance(config, LlamaConfig) else config.mlp_width


def _unpacked(config: ModelConfig, platform: str) -> int:
    """Bytes of the largest packed weight that is not an expert, in float32 and before that; on a CPU of a part."""
    sizes = [0]
    if packs(config.mxfp4, "linear") or config.types:
        projected = (config.num_heads + 2 * config.num_kv_heads) * config.head_width
        sizes += [config.width * max(projected, _up(config))]
    if packs(config.mxfp4, "embedding") or config.types:
        sizes += [config.width * config.vocab_size]
    return 8 * (min(max(sizes), AT_ONCE) if platform == "cpu" else max(sizes))


@functools.lru_cache(maxsize=16)
def weight_bytes(model: Model) -> tuple[int, int, int]:
    """Bytes of all weights, bytes of the largest as stored in float32, and the number of floating-point numbers."""
    leaves = jax.tree.leaves(abstract_params(model))
    floating = [leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    packed = [leaf.size for leaf in leaves if leaf.dtype == jnp.uint8]
    return tree_bytes(leaves), max(4 * max(floating), max(packed, default=0)), sum(floating)


def tree_bytes(tree: object) -> int:
    """Bytes of all arrays, real or abstract, of a pytree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
