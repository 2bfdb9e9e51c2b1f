"""Tools in the form of chat completions, which chat formats read, and the `tools` of `/v1/responses`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final

from gptjax.errors import GptjaxError, RequestError
from gptjax.server.errors import ApiError, as_json, bad_request
from gptjax.server.http.fields import check_text

WARNING: Final = "x-gptjax-warning"
"""The header that names what was left out."""
# Clients offer these unasked, the first ones to every server. Who asks for another tool that servers run needs it.
_LEFT_OUT: Final = frozenset(
    "web_search web_search_2025_08_26 web_search_preview web_search_preview_2025_03_11".split()
)
_OFFERED: Final = re.compile(r"^tools\[(\d+)\](\.function)?")
_OF_FUNCTIONS: Final = ("name", "description", "parameters")


@dataclasses.dataclass
class Tools:
    """Tools that were read."""

    offered: list[Any] = dataclasses.field(default_factory=list)
    """Those that the model may call."""
    places: list[str] = dataclasses.field(default_factory=list)
    """Where in the request they are, like "tools[2].tools[0]"."""
    strict: set[int] = dataclasses.field(default_factory=set)
    """The places of those whose arguments must be of their schema. (Prompts do not say so.)"""
    namespaces: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """For the name of a function that is part of a namespace: the namespace, and its name in there."""
    left_out: dict[str, None] = dataclasses.field(default_factory=dict)
    """The types of those that the model does not see, in order."""

    def add(self, function: dict[str, Any], where: str, *, strict: bool) -> None:
        """Offers a function."""
        if strict:
            self.strict.add(len(self.offered))
        self.places.append(where)
        self.offered.append({"type": "function", "function": function})

    def with_strict(self) -> list[Any]:
        """Those that are offered, with the `strict` of those that have it."""
        return [
            {**tool, "function": {**tool["function"], "strict": True}} if place in self.strict else tool
            for place, tool in enumerate(self.offered)
        ]

    def explained(self, error: GptjaxError) -> GptjaxError:
        """A chat format's error, with the place in the request of the tool that it is about, if any."""
        found = _OFFERED.match(str(error))
        return RequestError(self.places[int(found[1])] + str(error)[found.end() :]) if found else error


def whole_name(namespace: str, name: str) -> str:
    """The name by which the model knows a function of a namespace."""
    return f"{namespace}.{name}"


def read_tools(given: object) -> Tools:
    """`tools`; their functions are flat here. Raises `ApiError`."""
    found = Tools()
    if given is not None and not isinstance(given, list):
        raise bad_request("tools must be a list", "tools")
    for index, tool in enumerate(given or []):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        where = f"tools[{index}]"
        if kind == "function":
            _add_function(found, tool, where)
        elif kind == "namespace":
            _add_namespace(found, tool, where)
        elif isinstance(kind, str) and kind in _LEFT_OUT:
            found.left_out[kind] = None
        else:
            found.offered.append(tool)  # the chat format reads or refuses it
            found.places.append(where)
    return found


def _add_function(found: Tools, tool: Mapping[str, Any], where: str) -> None:
    strict = tool.get("strict")
    if not isinstance(strict, bool | None):
        raise bad_request(f"{where}.strict must be true or false, found {as_json(strict)}", "tools")
    found.add({name: tool.get(name) for name in _OF_FUNCTIONS}, where, strict=bool(strict))


def _add_namespace(found: Tools, tool: Mapping[str, Any], where: str) -> None:
    """The functions of a namespace. The first one's description begins with the namespace's."""
    name, about, inner = _text(tool, "name", where), tool.get("description"), tool.get("tools")
    if not isinstance(inner, list):
        raise bad_request(f"{where}.tools must be a list, found {as_json(inner)}", "tools")
    before = f"{name}: {_text(tool, 'description', where)}\n\n" if about else ""
    for index, function in enumerate(inner):
        place = f"{where}.tools[{index}]"
        if not isinstance(function, Mapping) or function.get("type") != "function":
            kind = function.get("type") if isinstance(function, Mapping) else function
            raise bad_request(f"{place} has the type {as_json(kind)}; expected function", "tools", "unsupported")
        own = _text(function, "name", place)
        described = function.get("description")
        if before and isinstance(described, str | None):
            described = before + (described or "")
        _add_function(found, {**function, "name": whole_name(name, own), "description": described}, place)
        found.namespaces[whole_name(name, own)] = name, own
        before = ""


def _text(values: Mapping[str, Any], name: str, where: str) -> str:
    value = values.get(name)
    try:
        return check_text(value, f"{where}.{name}")
    except ApiError as error:
        raise bad_request(str(error), "tools") from None
