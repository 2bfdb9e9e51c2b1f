"""A block of GPT-2 and one of GPT-OSS side by side, with the shape on every arrow."""

from collections.abc import Sequence
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from svg import Drawing

from gptjax.config import PUBLISHED, GptOssConfig, ModelConfig
from gptjax.layers.observe import COLLECTION
from gptjax.models.params import abstract_params
from gptjax.models.registry import build
from gptjax.models.stages import stages

MODELS: Final = {"GPT-2 124M": PUBLISHED["gpt2"], "gpt-oss-20b": PUBLISHED["gpt-oss-20b"]}
_COLUMN, _PITCH, _BOX = 450, 84, 40  # pixels: a column's width, from box to box, a box's height
_STREAM, _AROUND, _LEFT, _MIDDLE, _RIGHT = 40, 80, 170, 250, 330  # lanes of a column
_WIDE, _NARROW = 300, 140


def sizes(config: ModelConfig) -> dict[str, int]:
    """What each letter is in a model."""
    N, K = config.num_heads, config.num_kv_heads
    found = {"D": config.width, "N": N, "K": K, "R": N + 2 * K, "H": config.head_width, "F": config.mlp_width}
    if isinstance(config, GptOssConfig):
        found |= {"E": config.num_experts, "X": config.experts_per_token}
    return found


class Block:
    """Draws a block from top to bottom.

    Attributes:
      stages: the axes of each arrow that carries a stage of `lm.activations`, checked by `_check`.
    """

    def __init__(self, drawing: Drawing, left: int, config: ModelConfig) -> None:
        self._drawing, self._left, self._sizes = drawing, left, sizes(config)
        self._y = 110.0  # of the current row
        self._stream = 48.0  # down to where the residual stream is drawn
        self.stages: dict[str, str] = {}

    def box(self, title: str, name: str, kind: str, *, lane: int = _MIDDLE, row: float = 0) -> None:
        """A step, `row` rows below the current one."""
        width = _WIDE if lane == _MIDDLE else _NARROW
        self._drawing.box(self._left + lane, self._y + row * _PITCH, width, _BOX, [title, name], kind)

    def arrow(
        self, axes: str, name: str = "", *, lane: int = _MIDDLE, rows: float = 1, stages: Sequence[str] = ()
    ) -> None:
        """An arrow from the present row down, with the axes of what it carries and their sizes."""
        x, top = self._left + lane, self._y + _BOX / 2
        self._drawing.line([(x, top), (x, self._y + rows * _PITCH - _BOX / 2)])
        self.shape(lane + 8, (_PITCH - _BOX) / 2 + _BOX / 2, axes, name)
        self.stages |= dict.fromkeys(stages, axes)

    def shape(self, x: float, y: float, axes: str, name: str = "") -> None:
        """`name [B, T, D]`, and below it B × T × 768; y is from the present row."""
        where = (self._left + x, self._y + y)
        self._drawing.text(where[0], where[1] - 7, f"{name} [{axes}]".strip(), "small bold", anchor="start")
        found = " × ".join(str(self._sizes.get(axis, axis)) for axis in axes.replace("2F", "2·F").split(", "))
        found = found.replace("2·F", str(2 * self._sizes["F"]))
        self._drawing.text(where[0], where[1] + 7, found, "small faint", anchor="start")

    def down(self, rows: float = 1) -> None:
        """Goes on to another row."""
        self._y += rows * _PITCH

    def read(self, stage: str) -> None:
        """The residual stream, read by what comes next."""
        x, y = self._left + _STREAM, self._y
        self._flow(y)
        self._drawing.line([(x, y), (self._left + _MIDDLE - _WIDE / 2, y)])
        self.shape(_STREAM + 8, -44, "B, T, D")
        self.stages[stage] = "B, T, D"

    def add(self, *stages: str) -> None:
        """The residual stream, with the present row's result added."""
        x, y = self._left + _STREAM, self._y
        middle = self._left + _MIDDLE
        self._drawing.line([(middle, y - _PITCH + _BOX / 2), (middle, y), (x + 10, y)])
        self._flow(y - 10)
        self._stream = y + 10
        self._drawing.plus(x, y)
        self.shape(_MIDDLE + 8, -_PITCH / 2 + 6, "B, T, D")
        self.stages |= dict.fromkeys(stages, "B, T, D")

    def end(self) -> None:
        """The residual stream goes on to the next block."""
        self._flow(self._y + 48, head=True)
        self.shape(_STREAM + 8, 34, "B, T, D")

    def _flow(self, y: float, *, head: bool = False) -> None:
        x = self._left + _STREAM
        self._drawing.line([(x, self._stream), (x, y)], head=head, thick=True)
        self._stream = y

    def weights(self, rows: int) -> None:
        """From the router, around what is below, to the weighted sum."""
        x, y = self._left + _AROUND, self._y
        self._drawing.line(
            [
                (self._left + _LEFT - _NARROW / 2, y),
                (x, y),
                (x, y + rows * _PITCH),
                (self._left + _MIDDLE - _WIDE / 2, y + rows * _PITCH),
            ]
        )
        self._y += (rows - 1) * _PITCH
        self.shape(_AROUND + 6, _PITCH / 2, "B·T, X", "weights")
        self._y -= (rows - 1) * _PITCH


def _attention(block: Block, config: ModelConfig, norm: str) -> None:
    block.read("embedding")
    block.box(norm, "attention_norm", "norm")
    block.arrow("B, T, D", stages=["attention_norm"])
    block.down()
    block.box("linear: queries, keys and values", "attention/qkv", "attention")
    rotates = isinstance(config, GptOssConfig)
    block.arrow("B, T, N, H", "q", lane=_LEFT, rows=1 if rotates else 3, stages=["attention/q"])
    block.arrow("B, T, K, H", "k, v", lane=_RIGHT, rows=1 if rotates else 2, stages=["attention/k", "attention/v"])
    block.down()
    if rotates:
        block.box("RoPE with YaRN", "rotates q and k by position; v is unchanged", "attention")
        block.arrow("B, T, N, H", "q", lane=_LEFT, rows=2)
        block.arrow("B, T, K, H", "k, v", lane=_RIGHT)
    block.down()
    block.box("KV cache", "write, then read", "empty", lane=_RIGHT)
    block.arrow("B, K, S, H", "k, v", lane=_RIGHT)
    block.down()
    mask = "causal, a sink; blocks 0, 2, 4, …: window 128" if rotates else "causal"
    block.box("softmax(q · k / √H) · v", mask, "attention")
    block.arrow("B, T, N, H", "heads", stages=["attention/heads"])
    block.down()
    block.box("linear", "attention/out", "attention")
    block.down()
    block.add("attention/out", "attention_residual")
    block.down()


def _mlp(block: Block) -> None:
    block.read("attention_residual")
    block.box("LayerNorm", "mlp_norm", "norm")
    block.arrow("B, T, D", stages=["mlp_norm"])
    block.down()
    block.box("linear", "mlp/up", "mlp")
    block.arrow("B, T, F", stages=["mlp/up"])
    block.down()
    block.box("GELU", "mlp/activation", "mlp")
    block.arrow("B, T, F", stages=["mlp/activation"])
    block.down()
    block.box("linear", "mlp/down", "mlp")
    block.down()
    block.add("mlp/down", "mlp_residual")
    block.end()


def _moe(block: Block, config: ModelConfig) -> None:
    assert isinstance(config, GptOssConfig)
    few, many = config.experts_per_token, config.num_experts
    block.read("attention_residual")
    block.box("RMSNorm", "moe_norm", "norm")
    block.arrow("B, T, D", lane=_LEFT, stages=["moe_norm"])
    block.arrow("B, T, D", lane=_RIGHT, rows=2)
    block.down()
    block.box("router", f"[B, T, E] → top {few} of {many}", "mlp", lane=_LEFT)
    block.stages["moe/router"] = "B, T, E"
    block.arrow("B·T, X", "experts", lane=_LEFT)
    block.weights(4)
    block.down()
    block.box("linear: gate and up of each chosen expert", "moe/gate_up_kernel, in MXFP4", "mlp")
    block.arrow("B·T, X, 2F")
    block.down()
    block.box("SwiGLU, clamped", "gate · sigmoid(α · gate) · (up + 1)", "mlp")
    block.arrow("B·T, X, F")
    block.down()
    block.box("linear, for each chosen expert", "moe/down_kernel, in MXFP4", "mlp")
    block.arrow("B·T, X, D")
    block.down()
    block.box("weighted sum over X", "moe", "mlp")
    block.down()
    block.add("moe", "moe_residual")
    block.end()


def _check(block: Block, config: ModelConfig) -> None:
    """Raises `AssertionError` if an arrow disagrees with the model, or if a stage has no arrow."""
    one = config.with_one_layer()
    model = build(one)
    letters = sizes(config) | {"B": 3, "T": 5}
    tokens_BT = jax.ShapeDtypeStruct((letters["B"], letters["T"]), jnp.int32)
    run = partial(model.apply, mutable=[COLLECTION])
    _, recorded = jax.eval_shape(run, {"params": abstract_params(model)}, tokens_BT, tokens_BT)
    made = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/output"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(recorded[COLLECTION])
    }
    names = [name for name in stages(one) if name not in ("final_norm", "logits")]
    wanted = {name.removeprefix("block_0/"): made[name] for name in names}
    drawn = {name: tuple(letters[axis] for axis in axes.split(", ")) for name, axes in block.stages.items()}
    assert drawn == wanted, sorted(drawn.items() ^ wanted.items())


def draw() -> Drawing:
    """Both blocks."""
    drawing = Drawing(2 * _COLUMN, 1266, "A block of GPT-2 and a block of GPT-OSS, with the shape on every arrow")
    blocks = [Block(drawing, column * _COLUMN, config) for column, config in enumerate(MODELS.values())]
    for column, (name, config) in enumerate(MODELS.items()):
        title = f"{name}: one of {config.num_layers} blocks"
        drawing.text(column * _COLUMN + _COLUMN / 2, 24, title, "large")
    for block, config, norm in zip(blocks, MODELS.values(), ("LayerNorm", "RMSNorm"), strict=True):
        _attention(block, config, norm)
    for line, words in enumerate(("B rows, T tokens of this call,", "S positions of the cache")):
        drawing.text(_MIDDLE, 1190 + 18 * line, words, "small faint")
    _mlp(blocks[0])
    _moe(blocks[1], MODELS["gpt-oss-20b"])
    for block, config in zip(blocks, MODELS.values(), strict=True):
        _check(block, config)
    return drawing
