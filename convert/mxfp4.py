"""Rounding a checkpoint's weights to MXFP4 while it is converted."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from gptjax.checkpoints.weights import Path
from gptjax.config import GptOssConfig, ModelConfig, config_from_json
from gptjax.config.gpt_oss import is_original
from gptjax.config.quantization import BLOCK, TARGETS, mxfp4_to_json
from gptjax.errors import ConfigError
from gptjax.models.params import abstract_params, weights_by_path
from gptjax.models.registry import build
from pallas_kernels.formats.mxfp4 import MXFP4, quantize

_SLICE: Final = 1 << 20  # numbers rounded together: memory stays bounded, and one compiled program serves all weights


def packed_config(config: ModelConfig, targets: str) -> ModelConfig:
    """The configuration of a checkpoint whose `targets`, one of "experts", "linear" and "all", are rounded to MXFP4.

    Raises:
      ConfigError: the model has no such weights, more of it is packed already, or weights whose products sum over a
        number that is no multiple of 32; all of them are named.
    """
    if targets not in TARGETS[1:]:
        raise ConfigError(f"there are no weights {targets!r} to round to MXFP4; choose {', '.join(TARGETS[1:])}")
    if targets == "experts" and not isinstance(config, GptOssConfig):
        raise ConfigError("the model has no experts; choose linear (the products of its blocks) or all")
    if TARGETS.index(targets) < TARGETS.index(config.mxfp4):
        raise ConfigError(
            f"the checkpoint has {config.mxfp4!r} in MXFP4 already, which is more than {targets!r}, and rounding "
            f"cannot be undone; choose {config.mxfp4}, or start from the checkpoint that it was made of"
        )
    target = dataclasses.replace(config, mxfp4=targets)
    if faults := _misfits(config, target):
        more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
        raise ConfigError(
            f"MXFP4 packs blocks of {BLOCK} numbers that a product sums over, which does not go into these weights; "
            "choose fewer weights, or none:\n  " + "\n  ".join(faults[:5] + more)
        )
    return target


def chosen(config: ModelConfig, target: ModelConfig) -> dict[Path, MXFP4]:
    """The weights that are numbers in the one model and MXFP4 in the other: what they become, as shapes."""
    before, after = (weights_by_path(abstract_params(build(each))) for each in (config, target))
    return {
        path: leaf for path, leaf in after.items() if isinstance(leaf, MXFP4) and not isinstance(before[path], MXFP4)
    }


def summed_last(path: Path, array: Any) -> Any:
    """A weight with the axis that its products sum over as the last one, which it is in MXFP4; a view.

    Kernels are [..., in, out] as numbers; embeddings [V, D] are as they should be.
    """
    return array.swapaxes(-1, -2) if _is_kernel(path) else array


def rounded(path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of a weight, rounded from its values in float32.

    Args:
      path: of the weight.
      parts: its values as the models declare them, whole or cut along the first axis (if that is not summed over).
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
    buffer[:count].reshape(numbers.shape)[...] = numbers  # beyond, it keeps what it had
    packed = quantize(buffer)
    for target, values in ((blocks, packed.blocks), (scales, packed.scales)):
        target[...] = np.asarray(values)[:count].reshape(target.shape)  # waits: the buffer is free again


def is_cut(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a weight of such a shape, as the models declare it, can be rounded in parts of its first axis."""
    return len(shape) > 2 or not _is_kernel(path)


def slices(shape: tuple[int, ...], most: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut an array into whole rows of its last axis, at most so many numbers together (or one row)."""
    step = max(1, most // max(1, shape[-1]))
    for lead in itertools.product(*map(range, shape[:-2])):
        for start in range(0, shape[-2], step):
            yield (*lead, slice(start, start + step))


def config_json(raw: Mapping[str, Any], target: ModelConfig) -> dict[str, Any]:
    """A `config.json` that says what is packed in the target, its other keys as they are.

    OpenAI's own config cannot say it, so it becomes Hugging Face's spelling of the same.
    """
    if config_from_json(raw) == target:
        return dict(raw)
    return target.to_json() if is_original(raw) else {**raw, **mxfp4_to_json(target.mxfp4)}


def _misfits(config: ModelConfig, target: ModelConfig) -> list[str]:
    """The weights to be packed whose summed axis is no multiple of the block."""
    # A model that cannot be packed cannot be declared packed. One of the same layers can, in widths that fit.
    fitting = dataclasses.replace(target, width=BLOCK * target.num_heads, mlp_width=BLOCK)
    if isinstance(fitting, GptOssConfig):
        fitting = dataclasses.replace(fitting, head_width=BLOCK)
    leaves = weights_by_path(abstract_params(build(fitting)))
    packed = {path for path, leaf in leaves.items() if isinstance(leaf, MXFP4)}
    return [
        f"{'/'.join(path)} is {list(leaf.shape)}, and its products sum over {summed}"
        for path, leaf in weights_by_path(abstract_params(build(config))).items()
        if path in packed and (summed := leaf.shape[-2 if _is_kernel(path) else -1]) % BLOCK
    ]


def _is_kernel(path: Path) -> bool:
    return path[-1].endswith("kernel")
