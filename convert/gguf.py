"""The tensors of GGUF files. llama.cpp gives all families the same names, so one table serves them all.

Linear weights are stored [out, in], GPT-2's too; kernels here are [in, out], unless they stay packed. The configuration
says which do (`gptjax.config.gguf`); others are expanded. GPT-OSS's experts in MXFP4 only have their bytes put into our
order. Source: llama.cpp `conversion/`.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from convert.rules import IDENTITY, Ignored, Rule, Shape, Table, Transform
from gptjax.config import GPT2Config, ModelConfig
from gptjax.config.gguf import ROPE_FREQS
from gptjax.config.quantization import KEPT
from pallas_kernels.formats.ggml import PACKED
from pallas_kernels.formats.ggml.tables import to_mxfp4
from pallas_kernels.formats.mxfp4 import BLOCK, NAN_SCALE

_PAIRED_FAMILY: Final = "llama"
_KEPT: Final = {PACKED[name].nbytes: PACKED[name] for name in KEPT}  # by the bytes of a block


class _Pairs(NamedTuple):
    """Rows that are in the order of another rotation: value i of a head comes right before value i + H/2."""

    head_width: int
    rows: int  # how many, from the first one on


_NO_PAIRS: Final = _Pairs(0, 0)


def table(config: ModelConfig) -> Table:
    """The table for a configuration's tensors."""
    sizes = [heads * config.head_width for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    # llama.cpp turns neighbouring values in this family, so its converter interleaves the halves of each head.
    paired = getattr(config, "family", None) == _PAIRED_FAMILY
    pairs = _Pairs(config.head_width, sizes[0] + sizes[1]) if paired else _NO_PAIRS
    qkv = _linear("attn_{}", "attention/qkv", parts="qkv", sizes=sizes, pairs=pairs)
    fused = _linear("attn_qkv", "attention/qkv", pairs=pairs)  # GPT-2's; llama.cpp's --fuse-qkv makes it in others
    # The first is what a file that has neither is said to lack.
    qkv = [*fused, *qkv] if isinstance(config, GPT2Config) else [*qkv, *fused]
    gate_up = _linear("ffn_{}", "mlp/gate_up", parts=("gate", "up"), sizes=[config.mlp_width] * 2)
    rules = (*_ENDS, *_VECTORS, *qkv, *gate_up, *_LINEAR, *_EXPERTS)
    return Table(rules, (Ignored(ROPE_FREQS, "the rotation's factors, which are part of the configuration"),))


def _block(name: str, target: str, transform: Transform) -> Rule:
    return Rule(f"blk.{{N}}.{name}", f"block_{{N}}/{target}", transform)


def _linear(
    name: str, target: str, *, parts: Sequence[str] = (), sizes: Sequence[int] = (), pairs: _Pairs = _NO_PAIRS
) -> list[Rule]:
    """A linear layer's kernel and bias, from one tensor each or from parts of these sizes; the kernel packed or not."""
    names = [f"blk.{{N}}.{name.format(part)}" for part in parts] or [f"blk.{{N}}.{name}"]
    weights, biases = (tuple(f"{each}.{kind}" for each in names) for kind in ("weight", "bias"))
    layer = f"block_{{N}}/{target}"
    each_part = []
    for index, size in enumerate(sizes):
        paired = min(size, max(0, pairs.rows - sum(sizes[:index])))
        transform = _packed_rows((), pairs._replace(rows=paired))
        each_part.append(Rule(weights[index], f"{layer}/kernel/parts/{index}/blocks", transform))
    return [
        Rule(weights, f"{layer}/kernel", _rows(sizes, pairs, turned=True)),
        Rule(weights, f"{layer}/kernel/blocks", _packed_rows(sizes, pairs)),
        *each_part,
        Rule(biases, f"{layer}/bias", _rows(sizes, pairs, turned=False)),
    ]


def _rows(sizes: Sequence[int], pairs: _Pairs, *, turned: bool) -> Transform:
    """The rows of sources, one after the other.

    Args:
      sizes: how many rows each source has; none for a single source.
      pairs: the rows among them to put in order.
      turned: whether the target is the transpose of that.
    """

    def shapes(shape: Shape) -> tuple[Shape, ...]:
        stored = shape[::-1] if turned else shape
        return tuple((size, *stored[1:]) for size in sizes or stored[:1])

    def apply(*arrays: np.ndarray) -> np.ndarray:
        rows = _in_order(arrays, pairs)
        return rows.T if turned else rows

    return Transform("rows", shapes, apply, mixes_dtypes=True)


def _packed_rows(sizes: Sequence[int] = (), pairs: _Pairs = _NO_PAIRS) -> Transform:
    """Like `_rows`, of packed blocks [out, blocks, bytes] that stay as they are."""

    def shapes(shape: Shape) -> tuple[Shape, ...]:
        rows, blocks, width = shape
        return tuple((size, blocks * _KEPT[width].size) for size in sizes or (rows,))

    return Transform("packed rows", shapes, lambda *arrays: _in_order(arrays, pairs), packed=True, fault=_not_finite)


def _in_order(arrays: Sequence[np.ndarray], pairs: _Pairs) -> np.ndarray:
    rows = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    if not pairs.rows:
        return rows
    paired = rows[: pairs.rows]
    halves = paired.reshape(-1, pairs.head_width // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.concatenate([halves.reshape(paired.shape), rows[pairs.rows :]])


def _not_finite(blocks: np.ndarray) -> str:
    """What is wrong with packed blocks: a scale that is not finite."""
    return "" if _KEPT[blocks.shape[-1]].is_finite(blocks) else "NaN or infinity"


def _interleaved(*arrays: np.ndarray) -> np.ndarray:
    """Gate and up [E, F, ...] as GPT-OSS has them, alternating: [E, 2F, ...]."""
    gate = arrays[0]
    return np.stack(arrays, axis=2).reshape(gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])


def _halves(shape: Shape) -> tuple[Shape, Shape]:
    """The shapes of gate and up, from that of both."""
    half = (shape[0], shape[1] // 2, *shape[2:])
    return half, half


def _logical(blocks: Shape) -> Shape:
    """The shape of the numbers in packed blocks [..., n/32, 16]."""
    return (*blocks[:-2], blocks[-2] * BLOCK)


def _blocks_and_scales(
    shapes: Callable[[Shape], tuple[Shape, ...]], apply: Callable[..., np.ndarray]
) -> tuple[Transform, Transform]:
    """The two weights that experts in MXFP4 are.

    Args:
      shapes: the shapes of the sources, from that of their numbers together.
      apply: puts the sources together.
    """

    def together(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        blocks, scales = to_mxfp4(apply(*arrays))
        return blocks, np.ascontiguousarray(scales)  # not a view, which would keep all of the memory

    def one(name: str, index: int, logical: Callable[[Shape], Shape]) -> Transform:
        return Transform(
            name,
            lambda shape: shapes(logical(shape)),
            lambda *arrays: together(*arrays)[index],
            packed=True,
            fault=_nan_scale,
            together=together,
        )

    return one("blocks", 0, _logical), one("scales", 1, lambda shape: _logical((*shape, BLOCK // 2)))


def _nan_scale(array: np.ndarray) -> str:
    return f"the scale {NAN_SCALE}, which is NaN" if array[..., 0].max(initial=0) == NAN_SCALE else ""


_GATE_UP_BIAS: Final = Transform("interleaved", _halves, _interleaved, mixes_dtypes=True)
_GATE_UP: Final = Transform(
    "interleaved and transposed",
    lambda shape: _halves((shape[0], shape[2], shape[1])),
    lambda *arrays: _interleaved(*arrays).swapaxes(1, 2),
    mixes_dtypes=True,
)
_DOWN: Final = Transform(
    "transposed", lambda shape: ((shape[0], shape[2], shape[1]),), lambda array: array.swapaxes(1, 2)
)
_GATE_UP_BLOCKS, _GATE_UP_SCALES = _blocks_and_scales(_halves, _interleaved)
_DOWN_BLOCKS, _DOWN_SCALES = _blocks_and_scales(lambda shape: (shape,), lambda array: array)

_ENDS: Final = (
    Rule("token_embd.weight", "token_embedding", IDENTITY),
    Rule("token_embd.weight", "token_embedding/blocks", _packed_rows()),
    Rule("output.weight", "head_embedding", IDENTITY),
    Rule("output.weight", "head_embedding/blocks", _packed_rows()),
    Rule("position_embd.weight", "position_embedding", IDENTITY),
    Rule("output_norm.weight", "final_norm/scale", IDENTITY),
    Rule("output_norm.bias", "final_norm/bias", IDENTITY),
)
_VECTORS: Final = (
    _block("attn_norm.weight", "attention_norm/scale", IDENTITY),
    _block("attn_norm.bias", "attention_norm/bias", IDENTITY),
    _block("ffn_norm.weight", "mlp_norm/scale", IDENTITY),
    _block("ffn_norm.bias", "mlp_norm/bias", IDENTITY),
    _block("attn_q_norm.weight", "attention/q_norm/scale", IDENTITY),
    _block("attn_k_norm.weight", "attention/k_norm/scale", IDENTITY),
    _block("attn_sinks.weight", "attention/sinks", IDENTITY),
    _block("post_attention_norm.weight", "moe_norm/scale", IDENTITY),
)
_LINEAR: Final = (
    *_linear("attn_output", "attention/out"),
    *_linear("ffn_up", "mlp/up"),
    *_linear("ffn_down", "mlp/down"),
    *_linear("ffn_gate_inp", "moe/router"),
)
_EXPERT_PARTS: Final = ("blk.{N}.ffn_gate_exps", "blk.{N}.ffn_up_exps")
_GATE_UP_SOURCES: Final = tuple(f"{part}.weight" for part in _EXPERT_PARTS)
_EXPERTS: Final = (
    Rule(_GATE_UP_SOURCES, "block_{N}/moe/gate_up_kernel", _GATE_UP),
    Rule(_GATE_UP_SOURCES, "block_{N}/moe/gate_up_kernel/blocks", _GATE_UP_BLOCKS),
    Rule(_GATE_UP_SOURCES, "block_{N}/moe/gate_up_kernel/scales", _GATE_UP_SCALES),
    Rule(tuple(f"{part}.bias" for part in _EXPERT_PARTS), "block_{N}/moe/gate_up_bias", _GATE_UP_BIAS),
    _block("ffn_down_exps.weight", "moe/down_kernel", _DOWN),
    _block("ffn_down_exps.weight", "moe/down_kernel/blocks", _DOWN_BLOCKS),
    _block("ffn_down_exps.weight", "moe/down_kernel/scales", _DOWN_SCALES),
    _block("ffn_down_exps.bias", "moe/down_bias", IDENTITY),
)
