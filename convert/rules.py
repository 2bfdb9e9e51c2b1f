"""The words of conversion tables: which source tensors fill which target, and how; which are ignored or refused.

A transform knows its inverse, so a table is read in both directions: to convert a checkpoint and to export one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

Shape = tuple[int, ...]
FLOATS: Final = ("F32", "F16", "BF16")


Inverse = Callable[[np.ndarray], tuple[np.ndarray, ...]]  # the sources of a target, in order, as views


def _only_read(array: np.ndarray) -> tuple[np.ndarray, ...]:
    raise NotImplementedError("a transform of a format that is only read has no inverse")


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a target is made from its sources, and the sources from a target."""

    name: str
    source_shapes: Callable[[Shape], tuple[Shape, ...]]  # the shapes that fill a target of the given shape
    apply: Callable[..., np.ndarray]  # takes the sources in order; returns a view if possible
    dtypes: tuple[str, ...] = FLOATS  # allowed for the sources
    fault: Callable[[np.ndarray], str] = lambda array: ""  # what is wrong with a source's data; "" if nothing is
    mixes_dtypes: bool = False  # whether the sources may have different dtypes
    packed: bool = False  # whether it takes GGUF's packed blocks as they are stored, not the numbers in them
    # If the sources fill several targets: makes all of these, in the order of the table, so that they are read once.
    together: Callable[..., tuple[np.ndarray, ...]] | None = None
    invert: Inverse = _only_read


IDENTITY: Final = Transform("identity", lambda shape: (shape,), lambda array: array, invert=lambda array: (array,))
TRANSPOSED: Final = Transform("transposed", lambda shape: (shape[::-1],), np.transpose, invert=lambda array: (array.T,))


def stacked(sizes: Sequence[int]) -> Transform:
    """Concatenates sources with these numbers of rows along the first axis."""
    return Transform(
        "stacked",
        lambda shape: tuple((size, *shape[1:]) for size in sizes),
        lambda *arrays: np.concatenate(arrays),
        invert=lambda array: _split(array, sizes),
    )


def stacked_transposed(sizes: Sequence[int]) -> Transform:
    """Concatenates matrices with these numbers of rows, then transposes the result."""
    return Transform(
        "stacked and transposed",
        lambda shape: tuple((size, shape[0]) for size in sizes),
        lambda *arrays: np.concatenate(arrays).T,
        invert=lambda array: _split(array.T, sizes),
    )


def _split(array: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    return tuple(np.split(array, list(itertools.accumulate(sizes))[:-1]))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of a table: the source tensor (or tensors) that fill a target.

    `{N}` matches a whole number, the same on both sides; `[transformer.]` a prefix that a checkpoint has everywhere or
    nowhere. A source may have several rules, each filling its own target.
    """

    source: str | tuple[str, ...]  # as many as the transform takes
    target: str  # names joined with "/"
    transform: Transform = IDENTITY
    if_missing: str = ""  # added to the message if no tensor fills the target

    @property
    def sources(self) -> tuple[str, ...]:
        """The patterns, one for each part."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Known source tensors that are not needed."""

    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Copy:
    """An optional source tensor that must equal another one (after rounding, if one has a smaller dtype)."""

    source: str
    of: str
    otherwise: str  # what to do if they differ


@dataclasses.dataclass(frozen=True)
class Refused:
    """Source tensors that only another kind of model has."""

    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """All known tensors of a format."""

    rules: Sequence[Rule]
    ignored: Sequence[Ignored] = ()
    copies: Sequence[Copy] = ()
    refused: Sequence[Refused] = ()
