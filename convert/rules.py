"""Conversion tables and their executor: every source tensor is used or explicitly ignored, every target is filled.

The whole table is checked against headers before any data is read, and all faults are raised together.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from gptjax.checkpoints.safetensors import SafetensorsSource, listed
from gptjax.checkpoints.safetensors_header import TensorInfo
from gptjax.checkpoints.weights import Path, flatten
from gptjax.errors import CheckpointError
from gptjax.support.quoting import shown

Shape = tuple[int, ...]
FLOATS: Final = ("F32", "F16", "BF16")
_PIECE: Final = 1 << 22  # elements checked at a time, to need little memory


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a target is made from its sources."""

    name: str
    source_shapes: Callable[[Shape], tuple[Shape, ...]]  # the shapes that fill a target of the given shape
    apply: Callable[..., np.ndarray]  # takes the sources in order; returns a view if possible
    dtypes: tuple[str, ...] = FLOATS  # allowed for the sources
    fault: Callable[[np.ndarray], str] = lambda array: ""  # what is wrong with a source's data; "" if nothing is


IDENTITY: Final = Transform("identity", lambda shape: (shape,), lambda array: array)
TRANSPOSED: Final = Transform("transposed", lambda shape: (shape[::-1],), np.transpose)


def stacked(sizes: Sequence[int]) -> Transform:
    """Concatenates sources with these numbers of rows along the first axis."""
    return Transform(
        "stacked",
        lambda shape: tuple((size, *shape[1:]) for size in sizes),
        lambda *arrays: np.concatenate(arrays),
    )


def stacked_transposed(sizes: Sequence[int]) -> Transform:
    """Concatenates matrices with these numbers of rows, then transposes the result."""
    return Transform(
        "stacked and transposed",
        lambda shape: tuple((size, shape[0]) for size in sizes),
        lambda *arrays: np.concatenate(arrays).T,
    )


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


@dataclasses.dataclass(frozen=True)
class Fill:
    """One step of a checked conversion."""

    path: Path
    sources: tuple[str, ...]
    transform: Transform


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked conversion, in the order of the data in the files."""

    fills: tuple[Fill, ...]
    copies: tuple[tuple[str, str, str], ...]  # source, of, otherwise


def check(table: Table, tensors: Mapping[str, TensorInfo], targets: Mapping[str, Any]) -> Plan:
    """Matches source tensors to targets, using their headers only.

    Args:
      table: the format's rules.
      tensors: the source's tensors.
      targets: nested dicts; the leaves have `shape` and `dtype`.

    Raises:
      CheckpointError: tensors are unknown, duplicated, missing, of the wrong shape or dtype, or named in two styles;
        lists all of them, grouped.
    """
    return _Matcher(table, tensors, flatten(targets)).run()


def source_shapes(table: Table, targets: Mapping[str, Any]) -> dict[str, tuple[Shape, tuple[str, ...]]]:
    """Shape and allowed dtypes of the tensors that would fill the targets, by name, without optional prefixes.

    If several rules fill a target, the first one counts.
    """
    found: dict[str, tuple[Shape, tuple[str, ...]]] = {}
    for path, target in flatten(targets).items():
        for rule in table.rules:
            match = _compiled(rule.target).fullmatch("/".join(path))
            if match is None:
                continue
            shapes = rule.transform.source_shapes(tuple(target.shape))
            for source, shape in zip(rule.sources, shapes, strict=True):
                found[_filled(re.sub(r"\[.*?\]", "", source), match.groupdict())] = shape, rule.transform.dtypes
            break
    return found


def stream(plan: Plan, source: SafetensorsSource) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields path and array of each target.

    Raises:
      CheckpointError: a copy differs from its original (raised before the first target), or a tensor has NaN or
        infinity.
    """
    return ((path, read()) for path, read in readers(plan, source))


def readers(plan: Plan, source: SafetensorsSource) -> Iterator[tuple[Path, Callable[[], np.ndarray]]]:
    """Like `stream`, but with a function that reads and checks the array; several may run at a time, in threads."""
    for name, original, otherwise in plan.copies:
        if not _agree(source, name, original):
            dtypes = dict.fromkeys((source.tensors[name].dtype, source.tensors[original].dtype))
            rounded = f", {' and '.join(dtypes)}, even when rounded" if len(dtypes) > 1 else ""
            raise CheckpointError(f"{name} differs from {original}{rounded}; {otherwise}")
    for fill in plan.fills:
        yield fill.path, functools.partial(read, fill, source)


def parts(fill: Fill, source: SafetensorsSource) -> Iterator[np.ndarray]:
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


def read(fill: Fill, source: SafetensorsSource) -> np.ndarray:
    """One target, checked. Raises `CheckpointError`."""
    return fill.transform.apply(*(_checked(name, source.read(name), fill.transform) for name in fill.sources))


def _checked(name: str, array: np.ndarray, transform: Transform) -> np.ndarray:
    fault = transform.fault(array) if _finite(array) else "NaN or infinity"
    if fault:
        raise CheckpointError(
            f"{shown(name)} contains {fault}: the checkpoint is damaged or its training diverged; "
            "download it again or use another one"
        )
    return array


class _Matcher:
    """Collects a source's faults by kind."""

    def __init__(self, table: Table, tensors: Mapping[str, TensorInfo], targets: Mapping[Path, Any]):
        self._table, self._tensors, self._targets = table, tensors, targets
        self._rules: dict[Path, Rule] = {}  # those that fill a target, in the order of the data
        self._parts: dict[Path, dict[int, list[str]]] = {}  # the sources found for each of its parts
        self._copies: list[tuple[str, str, str]] = []
        self._prefixed: dict[bool, str] = {}  # whether a name has the optional prefix -> the first such name
        self._faults: dict[str, list[str]] = {
            kind: []
            for kind in (
                "of another kind of model",
                "missing",
                "unknown",
                "filling the same weight",
                "of the wrong shape",
                "of the wrong dtype",
                "with mixed dtypes in one weight",
                "with inconsistent prefixes",
            )
        }

    def run(self) -> Plan:
        for name, info in self._tensors.items():
            self._match(name, info)
        if len(self._prefixed) == 2:
            self._fault(
                "with inconsistent prefixes",
                f"{shown(self._prefixed[True])} has a prefix, {shown(self._prefixed[False])} has none",
            )
        for path, parts in self._parts.items():
            for names in parts.values():
                if len(names) > 1:
                    self._fault("filling the same weight", f"{'/'.join(path)}: {', '.join(map(shown, names))}")
            names = [name for part in parts.values() for name in part]
            if len({self._tensors[name].dtype for name in names}) > 1:
                listed_dtypes = ", ".join(f"{shown(name)} {self._tensors[name].dtype}" for name in names)
                self._fault("with mixed dtypes in one weight", listed_dtypes)
        for path in self._targets:
            self._faults["missing"] += self._missing(path)
        groups = [
            f"{len(faults)} tensor{'s' * (len(faults) > 1)} {kind}:\n" + listed(sorted(faults), indent="    ")
            for kind, faults in self._faults.items()
            if faults
        ]
        if groups:
            raise CheckpointError(
                "the tensors do not match the model that config.json describes; correct config.json or download the "
                "checkpoint again\n  " + "\n  ".join(groups)
            )
        fills = (
            Fill(path, tuple(self._parts[path][part][0] for part in range(len(rule.sources))), rule.transform)
            for path, rule in self._rules.items()
        )
        return Plan(tuple(fills), tuple(self._copies))

    def _fault(self, kind: str, text: str) -> None:
        self._faults[kind].append(text)

    def _match(self, name: str, info: TensorInfo) -> None:
        known = any(self._matched(row.source, name) is not None for row in self._table.ignored)
        for row in self._table.refused:
            if self._matched(row.source, name) is not None:
                known = True
                self._fault("of another kind of model", f"{shown(name)} {row.reason}")
        for copy in self._table.copies:
            if self._matched(copy.source, name) is not None:
                known = True
                self._match_copy(copy, name, info)
        absent = ""
        for rule in self._table.rules:
            for part, source in enumerate(rule.sources):
                values = self._matched(source, name)
                if values is None:
                    continue
                path = tuple(_filled(rule.target, values).split("/"))
                if path in self._targets:
                    known = True
                    self._fill(path, rule, part, info)
                else:
                    absent = f" (the model has no {shown('/'.join(path))})"
        if not known:
            self._fault("unknown", shown(name) + absent)

    def _matched(self, pattern: str, name: str) -> dict[str, str] | None:
        match = _compiled(pattern).fullmatch(name)
        if match is None:
            return None
        values = match.groupdict(default="")
        if "_prefix" in values:
            self._prefixed.setdefault(bool(values.pop("_prefix")), name)
        return values

    def _fill(self, path: Path, rule: Rule, part: int, info: TensorInfo) -> None:
        expected = rule.transform.source_shapes(tuple(self._targets[path].shape))[part]
        if info.shape != expected:
            self._fault("of the wrong shape", f"{shown(info.name)} is {list(info.shape)}, expected {list(expected)}")
        if info.dtype not in rule.transform.dtypes:
            self._fault(
                "of the wrong dtype",
                f"{shown(info.name)} is {info.dtype}, expected {' or '.join(rule.transform.dtypes)}",
            )
        self._rules.setdefault(path, rule)
        self._parts.setdefault(path, {}).setdefault(part, []).append(info.name)

    def _match_copy(self, copy: Copy, name: str, info: TensorInfo) -> None:
        for other in self._tensors.values():
            if _compiled(copy.of).fullmatch(other.name) is None:
                continue
            if info.shape != other.shape:
                found = f"{list(info.shape)}, but {shown(other.name)} is {list(other.shape)}"
                self._fault("of the wrong shape", f"{shown(name)} is {found}; {copy.otherwise}")
            elif info.dtype not in FLOATS:
                self._fault("of the wrong dtype", f"{shown(name)} is {info.dtype}, expected {' or '.join(FLOATS)}")
            elif other.dtype in FLOATS:
                self._copies.append((name, other.name, copy.otherwise))

    def _missing(self, path: Path) -> list[str]:
        """The names of the missing tensors of a target."""
        found = self._parts.get(path, {})
        for rule in (self._rules[path],) if path in self._rules else self._table.rules:
            match = _compiled(rule.target).fullmatch("/".join(path))
            if match is not None:
                optional = r"\1" if True in self._prefixed else ""
                names = [_filled(re.sub(r"\[(.*?)\]", optional, source), match.groupdict()) for source in rule.sources]
                lacking = [name for part, name in enumerate(names) if part not in found]
                return ["; ".join(filter(None, (name, rule.if_missing))) for name in lacking]
        return [f"no rule fills {'/'.join(path)}: this is a bug in gptjax, please report it"]


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\}|\[.*?\])", pattern)
    number = "(?P<{}>0|[1-9][0-9]*)"
    return re.compile(
        "".join(
            number.format(part[1:-1])
            if part.startswith("{")
            else f"(?P<_prefix>{re.escape(part[1:-1])})?"
            if part.startswith("[")
            else re.escape(part)
            for part in parts
        )
    )


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    for key, value in values.items():
        pattern = pattern.replace("{" + key + "}", value)
    return pattern


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))


def _agree(source: SafetensorsSource, name: str, original: str) -> bool:
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
