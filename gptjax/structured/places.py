"""The parts of a JSON schema, and where in it a fault is: llguidance does not say where something stands."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from gptjax.support.quoting import quoted

_MOST_TRIES: Final = 500  # schemas compiled to find a fault
_MOST_SECONDS: Final = 1.0
_ONE: Final = frozenset(
    """additionalItems additionalProperties contains else if items not propertyNames then unevaluatedItems
    unevaluatedProperties""".split()
)
_LISTS: Final = frozenset(("allOf", "anyOf", "items", "oneOf", "prefixItems"))
_MAPS: Final = frozenset(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"))
_NULLABLE: Final = frozenset(("const", "default"))
_SHARED: Final = ("$defs", "definitions", "$schema")  # what references in any part may need


def place_of(schema: Mapping[str, Any], fault: Callable[[Mapping[str, Any]], str | None]) -> str:
    """The keyword that is at fault and where it is, such as `"not" at #/properties/a`.

    Args:
      schema: has a fault.
      fault: what is wrong with a schema; None if nothing is.
    """
    whole, place, part = fault(schema), "#", schema
    shared = {name: schema[name] for name in _SHARED if name in schema}
    left, until = itertools.count(_MOST_TRIES, -1), time.monotonic() + _MOST_SECONDS

    def still(part: Mapping[str, Any]) -> bool | None:
        """Whether a part has the same fault; None if too many were looked at, or for too long."""
        return fault(part) == whole if next(left) > 0 and time.monotonic() < until else None

    while deeper := next(((step, child) for step, child in _children(part) if still(_with(child, shared))), None):
        place, part = place + deeper[0], deeper[1]
    rest = ((name, {key: part[key] for key in part if key != name}) for name in part)
    keyword = next((name for name, others in rest if still(others) is False), None)
    return f"the JSON schema at {place}" if keyword is None else f"the JSON schema has {quoted(keyword)} at {place}"


def without_nulls(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without keywords that are null, which clients write for those that are absent."""
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _ONE and isinstance(value, Mapping):
            found[name] = without_nulls(value)
        elif name in _LISTS and isinstance(value, list):
            found[name] = [without_nulls(each) if isinstance(each, Mapping) else each for each in value]
        elif name in _MAPS and isinstance(value, Mapping):
            found[name] = {
                key: without_nulls(each) if isinstance(each, Mapping) else each for key, each in value.items()
            }
        elif value is not None or name in _NULLABLE:
            found[name] = value
    return found


def _with(part: Mapping[str, Any], shared: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part with what it may refer to."""
    return {**shared, **part} if "$ref" in part else part


def _children(part: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in part.items():
        listed: list[tuple[str, object]] = []
        if name in _ONE and isinstance(value, Mapping):
            listed = [(name, value)]
        elif name in _LISTS and isinstance(value, list):
            listed = [(f"{name}/{index}", each) for index, each in enumerate(value)]
        elif name in _MAPS and isinstance(value, Mapping):
            listed = [(f"{name}/{_pointer(key)}", each) for key, each in value.items()]
        for step, each in listed:
            if isinstance(each, Mapping):
                yield f"/{step}", each


def _pointer(name: object) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")[:100]
