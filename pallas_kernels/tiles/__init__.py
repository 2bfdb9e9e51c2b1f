"""Tile sizes as data: the settings that `gptjax bench --tune` found fastest, in `<device>.json` next to this file.

A kernel looks its settings up when it is traced, and falls back on a heuristic of its own:

    shape = {"rows": T, "in": I, "out": O, "dtype": x_TI.dtype.name}
    settings = tiles.lookup(device_kind, "matvec/mosaic", shape) or heuristic(shape)

It does so outside its own `jax.jit` function, to which settings are static arguments: inside, the first answer would
stay.

A kernel is named "<op>/<implementation>". To be tuned, its module (`dispatch.module`) has a function

    def tunable(shape: Shape) -> list[Settings]

that returns the settings worth trying for such a shape, the heuristic's among them. A kernel of several parts looks up
each, with {"part": "up", ...}.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

Shape = Mapping[str, int | str]  # names and sizes, all of them positive; also a dtype or a part
Settings = dict[str, int | str]
Key = tuple[str, tuple[tuple[str, int | str], ...]]  # an operation, and its shape's items in order

ROWS: Final = "rows"  # of a shape: for this size, the nearest will do

_KINDS: Final = {
    "operation": "a text such as 'matvec/mosaic'",
    "shape": "names with sizes from 1 on, or texts",
    "settings": "names with whole numbers, or texts",
    "microseconds": "a number above 0",
    "date": "a text",
    "jax": "a text",
}
_FIX: Final = "correct or remove it, and run `gptjax bench --tune`"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest settings of an operation at a shape, and the measurement that found them."""

    operation: str
    shape: dict[str, int | str]
    settings: Settings
    microseconds: float
    date: str  # ISO 8601
    jax: str  # its version

    @property
    def key(self) -> Key:
        """The question that it answers."""
        return key(self.operation, self.shape)


def key(operation: str, shape: Shape) -> Key:
    """An operation at a shape, hashable."""
    return operation, tuple(sorted(shape.items()))


def path(device_kind: str) -> Path:
    """A device's file, by JAX's `device_kind`: for "NVIDIA H200", nvidia-h200.json next to this one."""
    return Path(__file__).parent / (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json")


def lookup(device_kind: str, operation: str, shape: Shape) -> Settings | None:
    """The settings in a device's table for this shape, or for the nearest number of rows (by ratio) of an equal one.

    None if there are none: the kernel's heuristic decides.

    Raises:
      ValueError: the device's table is malformed.
    """
    asked = key(operation, shape)
    if (current := _trial.get()) is not None:
        given, noted = current
        if asked not in noted:
            noted.append(asked)
        if asked in given:
            return dict(given[asked])
    near = [
        entry
        for entry in read(path(device_kind))
        if entry.operation == operation and {**entry.shape, ROWS: 0} == {**shape, ROWS: 0}
    ]
    if not near:
        return None
    rows = _rows(shape)
    return dict(min(near, key=lambda entry: (abs(math.log(_rows(entry.shape) / rows)), -_rows(entry.shape))).settings)


def _rows(shape: Shape) -> int:
    return int(shape.get(ROWS, 1))


_trial: contextvars.ContextVar[tuple[Mapping[Key, Settings], list[Key]] | None] = contextvars.ContextVar(
    "trial", default=None
)


@contextlib.contextmanager
def trial(given: Mapping[Key, Settings]) -> Iterator[list[Key]]:
    """Inside it, `lookup` prefers the given settings to a table's. Yields the keys that it is asked for."""
    noted: list[Key] = []
    token = _trial.set((given, noted))
    try:
        yield noted
    finally:
        _trial.reset(token)


@functools.cache
def read(file: Path) -> tuple[Entry, ...]:
    """The entries of a table; none if there is no such file.

    Raises:
      ValueError: it is malformed; says in which file and entry.
    """
    if not file.exists():
        return ()
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a tile table: not valid JSON ({error}); {_FIX}") from None
    if not isinstance(raw, list):
        raise ValueError(f"{file} is not a tile table: it must be a list, found {type(raw).__name__}; {_FIX}")
    entries = [_entry(f"{file}, entry {number}", each) for number, each in enumerate(raw, start=1)]
    first: dict[Key, int] = {}
    for number, entry in enumerate(entries, start=1):
        if first.setdefault(entry.key, number) != number:
            raise ValueError(f"{file}, entry {number}: the same as entry {first[entry.key]}; {_FIX}")
    return tuple(entries)


def _entry(place: str, raw: Any) -> Entry:
    if not isinstance(raw, dict) or raw.keys() != _KINDS.keys():
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{place}: it must have {', '.join(_KINDS)}, found {found}; {_FIX}")
    sound = {
        "shape": _is_mapping(raw["shape"], least=1),
        "settings": _is_mapping(raw["settings"]) and raw["settings"] != {},
        "microseconds": type(raw["microseconds"]) in (int, float) and 0 < raw["microseconds"] < math.inf,
    }
    for name, kind in _KINDS.items():
        if not sound.get(name, isinstance(raw[name], str)):
            raise ValueError(f"{place}: {name} must be {kind}, found {raw[name]!r}; {_FIX}")
    if not isinstance(raw["shape"].get(ROWS, 1), int):
        raise ValueError(f"{place}: {ROWS} must be a number, found {raw['shape'][ROWS]!r}; {_FIX}")
    return Entry(**raw)


def _is_mapping(value: Any, least: int | None = None) -> bool:
    """Whether all values are texts or whole numbers (not booleans), none below `least`."""
    return isinstance(value, dict) and all(
        isinstance(each, str) or (type(each) is int and (least is None or each >= least)) for each in value.values()
    )


def text(entries: Iterable[Entry]) -> str:
    """A table as JSON: one entry per line, sorted by operation and shape."""
    lines = [json.dumps(dataclasses.asdict(entry), ensure_ascii=False) for entry in sorted(entries, key=_order)]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _order(entry: Entry) -> Any:
    return entry.operation, [(name, isinstance(size, str), size) for name, size in entry.key[1]]


def update(file: Path, entries: Iterable[Entry]) -> None:
    """Adds entries to a table, replacing those with the same keys. Creates the file if there is none.

    Raises:
      ValueError: the existing table is malformed.
      OSError: it cannot be written.
    """
    kept = {entry.key: entry for entry in (*read(file), *entries)}
    partial = file.with_name(file.name + ".partial")  # so that no reader finds half a table
    partial.write_text(text(kept.values()), encoding="utf-8")
    partial.replace(file)
    read.cache_clear()
