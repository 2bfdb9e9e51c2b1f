"""Filling the targets of a matched table: tensors are read, checked and transformed, one target at a time."""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from convert.matching import Fill, Plan
from convert.rules import IDENTITY, Transform
from gptjax.checkpoints.checkpoint import TensorSource
from gptjax.checkpoints.safetensors_header import NUMPY_DTYPES
from gptjax.checkpoints.weights import Path
from gptjax.errors import CheckpointError
from gptjax.gguf import GGUFFile
from gptjax.support.quoting import shown

_PIECE: Final = 1 << 22  # elements checked at a time, to need little memory


def readers(plan: Plan, source: TensorSource) -> Iterator[tuple[Path, Callable[[], np.ndarray]]]:
    """Yields each target's path and a function that reads and checks it; several may run at a time, in threads.

    Raises:
      CheckpointError: a copy differs from its original (raised before the first target). The functions raise it too: a
        file cannot be read, or a tensor has NaN or infinity.
    """
    for name, original, otherwise in plan.copies:
        if not _agree(source, name, original):
            dtypes = dict.fromkeys((source.tensors[name].dtype, source.tensors[original].dtype))
            rounded = f", {' and '.join(dtypes)}, even when rounded" if len(dtypes) > 1 else ""
            raise CheckpointError(f"{name} differs from {original}{rounded}; {otherwise}")
    for (_, together), group in itertools.groupby(plan.fills, key=lambda fill: (fill.sources, fill.transform.together)):
        fills = list(group)
        shared = None if together is None else _Shared(fills[0], source, together)
        for index, fill in enumerate(fills):
            take = functools.partial(read, fill, source) if shared is None else functools.partial(shared.take, index)
            yield fill.path, take


class _Shared:
    """Several targets of the same sources, which are read when the first is taken; the others are kept until then."""

    def __init__(self, fill: Fill, source: TensorSource, together: Callable[..., tuple[np.ndarray, ...]]) -> None:
        self._fill, self._source, self._together = fill, source, together
        self._left: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def take(self, index: int) -> np.ndarray:
        with self._lock:
            if index not in self._left:
                self._left = dict(enumerate(self._together(*_arrays(self._fill, self._source))))
            return self._left.pop(index)


def parts(fill: Fill, source: TensorSource) -> Iterator[np.ndarray]:
    """One target in consecutive parts along its first axis, to save memory; whole if it must be transformed.

    Raises `CheckpointError`.
    """
    if fill.transform is not IDENTITY:
        yield read(fill, source)
        return
    (name,) = fill.sources
    shape = source.tensors[name].shape
    row = math.prod(shape[1:])
    for part in source.slices(name, max(1, _PIECE // max(1, row)) * row):
        yield _checked(name, part, fill.transform).reshape(-1, *shape[1:])


def read(fill: Fill, source: TensorSource) -> np.ndarray:
    """One target, checked. Raises `CheckpointError`."""
    return fill.transform.apply(*_arrays(fill, source))


def _arrays(fill: Fill, source: TensorSource) -> Iterator[np.ndarray]:
    """A target's sources, checked."""
    get = source.packed if fill.transform.packed and isinstance(source, GGUFFile) else source.read
    return (_checked(name, get(name), fill.transform) for name in fill.sources)


def dtype(fill: Fill, source: TensorSource) -> np.dtype[Any]:
    """The dtype of what `read` returns."""
    if fill.transform.packed:
        return np.dtype(np.uint8)
    return np.result_type(*(NUMPY_DTYPES[source.tensors[name].dtype] for name in fill.sources))


def _checked(name: str, array: np.ndarray, transform: Transform) -> np.ndarray:
    fault = transform.fault(array) if _finite(array) else "NaN or infinity"
    if fault:
        raise CheckpointError(
            f"{shown(name)} contains {fault}: the checkpoint is damaged or its training diverged; "
            "download it again or use another one"
        )
    return array


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))


def _agree(source: TensorSource, name: str, original: str) -> bool:
    """Whether two tensors of one shape have the same bits, after rounding one to the other's dtype if they differ."""
    there = back = True
    for x, y in zip(source.slices(name, _PIECE), source.slices(original, _PIECE), strict=True):
        there = there and _same_bits(_as(x, y.dtype), y)
        back = back and _same_bits(x, _as(y, x.dtype))
        if not (there or back):
            return False
    return True


def _as(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(a.view(bits), b.view(bits))


def _finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    exponent = np.array(np.inf, array.dtype)
    bits = np.dtype(f"u{array.dtype.itemsize}")
    mask = exponent.view(bits)  # infinity and NaN have all exponent bits set, finite numbers do not
    return not any(((piece.view(bits) & mask) == mask).any() for piece in _pieces(array))
