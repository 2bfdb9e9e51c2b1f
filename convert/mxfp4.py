"""Rounds a checkpoint's weights to MXFP4 during conversion."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from gptjax.checkpoints.weights import Path
from gptjax.config import GPT2Config, GptOssConfig, ModelConfig, config_from_json
from gptjax.config.gpt_oss import is_original
from gptjax.config.quantization import BLOCK, TARGETS, packing_to_json
from gptjax.config.rope import Rope
from gptjax.errors import ConfigError
from gptjax.models.packing import is_kernel, summed_last
from gptjax.models.params import abstract_params, weights_by_path
from gptjax.models.registry import build
from gptjax.support.quoting import listed
from pallas_kernels.formats.mxfp4 import MXFP4, quantize

_SLICE: Final = 1 << 20  # numbers rounded per call: bounds memory, and one compiled program serves all weights


def packed_config(config: ModelConfig, targets: str) -> ModelConfig:
    """The configuration with `targets` ("experts", "linear" or "all") rounded to MXFP4.

    Raises:
      ConfigError: the model has no such weights, it already has more packed, or some weights sum over an axis whose
        length is not a multiple of 32; names all of these.
    """
    if targets not in TARGETS[1:]:
        raise ConfigError(f"cannot round {targets!r} to MXFP4; choose one of {', '.join(TARGETS[1:])}")
    if config.types:
        raise ConfigError(
            "the checkpoint's weights are packed in a GGUF file's types, and packing them again would lose more; start "
            "from a checkpoint in float16, bfloat16 or float32"
        )
    if targets == "experts" and not isinstance(config, GptOssConfig):
        raise ConfigError("the model has no experts; choose linear (every matrix in its blocks) or all")
    if TARGETS.index(targets) < TARGETS.index(config.mxfp4):
        raise ConfigError(
            f"the checkpoint already has {config.mxfp4!r} in MXFP4, which is more than {targets!r}, and rounding "
            f"cannot be undone; choose {config.mxfp4}, or start from the checkpoint it was made from"
        )
    target = dataclasses.replace(config, mxfp4=targets)
    if faults := _misfits(config, target):
        raise ConfigError(
            f"MXFP4 packs blocks of {BLOCK} numbers along the axis that a product sums over, and these weights do not "
            "divide into such blocks; choose fewer weights, or none:\n" + listed(faults, most=5)
        )
    return target


def chosen(config: ModelConfig, target: ModelConfig) -> dict[Path, MXFP4]:
    """The weights that are plain arrays in `config`'s model and MXFP4 in `target`'s, with their MXFP4 shapes."""
    before, after = (weights_by_path(abstract_params(build(each))) for each in (config, target))
    return {
        path: leaf for path, leaf in after.items() if isinstance(leaf, MXFP4) and not isinstance(before[path], MXFP4)
    }


def rounded(path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of a weight, rounded from its values in float32.

    Args:
      path: the weight's path.
      parts: its values as the model declares them, whole or cut along the first axis (if that is not summed over).
      shape: of the whole weight in MXFP4, the summed axis last.
    """
    count = (*shape[:-1], shape[-1] // BLOCK)
    blocks, scales = np.empty((*count, BLOCK // 2), np.uint8), np.empty(count, np.uint8)
    buffer = np.zeros((max(_SLICE, shape[-1]) // BLOCK, BLOCK), np.float32)
    start = 0
    for part in parts:
        rows = summed_last(path, part)
        for index in slices(rows.shape, _SLICE):
            _round(rows[index], buffer, blocks[start:][index], scales[start:][index])
        start += len(rows)
        del part, rows  # before the next one is read
    return blocks, scales


def _round(numbers: np.ndarray, buffer: np.ndarray, blocks: np.ndarray, scales: np.ndarray) -> None:
    count = numbers.size // BLOCK
    buffer[:count].reshape(numbers.shape)[...] = numbers  # the rest of the buffer keeps its old content
    packed = quantize(buffer)
    for target, values in ((blocks, packed.blocks), (scales, packed.scales)):
        target[...] = np.asarray(values)[:count].reshape(target.shape)  # waits, so the buffer can be reused


def is_cut(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape, as the model declares it, can be rounded in parts along its first axis."""
    return len(shape) > 2 or not is_kernel(path)


def slices(shape: tuple[int, ...], most: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut an array into groups of whole rows of its last axis, of at most `most` numbers (or one row)."""
    step = max(1, most // max(1, shape[-1]))
    for lead in itertools.product(*map(range, shape[:-2])):
        for start in range(0, shape[-2], step):
            yield (*lead, slice(start, min(start + step, shape[-2])))


def config_json(raw: Mapping[str, Any], target: ModelConfig) -> dict[str, Any]:
    """A `config.json` that declares what the target has packed; other keys are kept.

    OpenAI's own format cannot express that, so it is rewritten in Hugging Face's.
    """
    if config_from_json(raw) == target:
        return dict(raw)
    return target.to_json() if is_original(raw) else {**raw, **packing_to_json(target.mxfp4, target.types)}


def _misfits(config: ModelConfig, target: ModelConfig) -> list[str]:
    """The weights to pack whose summed axis is not a multiple of the block."""
    # A model that cannot be packed cannot be declared packed, but one with the same layers and fitting widths can.
    fitting = dataclasses.replace(target, width=BLOCK * target.num_heads, mlp_width=BLOCK)
    if not isinstance(fitting, GPT2Config):  # whose heads follow from its width
        fitting = dataclasses.replace(fitting, head_width=BLOCK, rope=Rope(fitting.rope.theta))
    leaves = weights_by_path(abstract_params(build(fitting)))
    packed = {path for path, leaf in leaves.items() if isinstance(leaf, MXFP4)}
    return [
        f"{'/'.join(path)} is {list(leaf.shape)}, and its products sum over {summed}"
        for path, leaf in weights_by_path(abstract_params(build(config))).items()
        if path in packed and (summed := leaf.shape[-2 if is_kernel(path) else -1]) % BLOCK
    ]
