"""Matching a table with a checkpoint: every source tensor is used or knowingly ignored, and every target is filled.

The whole table is checked against headers before any data is read, and all faults are raised together.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Protocol

from convert.rules import FLOATS, Copy, Rule, Shape, Table, Transform
from gptjax.checkpoints.weights import Path, flatten
from gptjax.errors import CheckpointError
from gptjax.support.quoting import listed, shown


class TensorInfo(Protocol):
    """What a file's header says about a tensor."""

    @property
    def name(self) -> str:
        """The name in the file."""

    @property
    def shape(self) -> Shape:
        """The shape in NumPy's order."""

    @property
    def dtype(self) -> str:
        """By safetensors' name: "F32"."""


@dataclasses.dataclass(frozen=True)
class Fill:
    """One step of a checked conversion."""

    path: Path
    shape: Shape
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


def names_of(table: Table, path: Path) -> tuple[tuple[str, ...], Transform]:
    """The names of the tensors that fill a target, as transformers saves them (with optional prefixes), and how.

    If several rules fill a target, the first one counts.

    Raises:
      CheckpointError: no rule fills it.
    """
    for rule in table.rules:
        match = _compiled(rule.target).fullmatch("/".join(path))
        if match is not None:
            names = (_filled(re.sub(r"\[(.*?)\]", r"\1", source), match.groupdict()) for source in rule.sources)
            return tuple(names), rule.transform
    raise CheckpointError(_no_rule(path))


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
            mixes = self._rules[path].transform.mixes_dtypes
            if not mixes and len({self._tensors[name].dtype for name in names}) > 1:
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
                f"the tensors do not match the model that {self._table.described}\n  " + "\n  ".join(groups)
            )
        return Plan(tuple(self._fill_of(path, rule) for path, rule in self._rules.items()), tuple(self._copies))

    def _fill_of(self, path: Path, rule: Rule) -> Fill:
        sources = tuple(self._parts[path][part][0] for part in range(len(rule.sources)))
        return Fill(path, tuple(self._targets[path].shape), sources, rule.transform)

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
        return [_no_rule(path)]


def _no_rule(path: Path) -> str:
    return f"no rule fills {'/'.join(path)}: this is a bug in gptjax, please report it"


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
