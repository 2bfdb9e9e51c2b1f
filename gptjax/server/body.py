"""The JSON of a request, read within limits, and its fields, checked one by one."""

import asyncio
import contextlib
import gc
import json
import math
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Final, NoReturn

from starlette.requests import ClientDisconnect, Request

from gptjax.server.errors import ApiError, as_json, bad_request, kind_of
from gptjax.server.service import Service
from gptjax.server.settings import Limits
from gptjax.server.sse import ClientGone
from gptjax.text.vocabulary import is_text

_SMALL: Final = 1 << 16  # bytes; parsed in less than a millisecond
# Commas and opening brackets, also those in strings: 15 times the tokens of a context of 131,072. Three bytes of JSON
# can take 64 of memory, and Python's parser holds up all other threads while it makes them.
_MOST_MARKS: Final = 2_000_000


@contextlib.asynccontextmanager
async def reading(request: Request, service: Service) -> AsyncIterator[dict[str, Any]]:
    """The object in a request's body; holds a place in the queue until the request is submitted or refused.

    Raises:
      ApiError: the body is too large (413, or 429 together with others), too slow (408), or not a JSON object (400).
      ClientGone: the client left.
      QueueFull, Unavailable: there is no place; the body is not parsed, so refusing costs little.
    """
    with service.body() as grow:
        data = await _read_in_time(request, service.limits, grow)
        with service.place():
            if len(data) <= _SMALL:
                yield _parse(data)
            else:  # megabytes take time, and others are waiting
                yield await asyncio.get_running_loop().run_in_executor(service.parser, _parse_large, data)


async def _read_in_time(request: Request, limits: Limits, grow: Callable[[int], None]) -> bytes:
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _read(request, limits.body_bytes, grow)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
    except ClientDisconnect:
        raise ClientGone from None


def _parse_large(data: bytes) -> dict[str, Any]:
    """`_parse` for bodies whose number of values matters: bounded, and without garbage collection.

    That takes ten times as long with millions of lists.
    """
    marks = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if marks > _MOST_MARKS:
        raise bad_request(
            f"the body has {marks} commas and brackets, more than {_MOST_MARKS}: send it as several requests",
            code="too_large",
        )
    collects = gc.isenabled()
    gc.disable()
    try:
        return _parse(data)
    finally:
        if collects:
            gc.enable()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of thousands of digits, deep nesting
        raise bad_request(f"the body is not valid JSON in UTF-8 ({str(error)[:100]})", code="bad_json") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, found {kind_of(value)}", code="bad_json")
    return value


async def _read(request: Request, most: int, grow: Callable[[int], None]) -> bytes:
    declared = request.headers.get("content-length", "0")
    data = bytearray()
    if not (declared.isdecimal() and len(declared) < 20 and int(declared) > most):
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                break
            if len(data) > _SMALL:
                grow(len(data))
        else:
            return bytes(data)
    raise ApiError(413, f"the body is larger than {most} bytes", code="body_too_large", headers={"Connection": "close"})


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):  # 1e999, which could not be repeated in an answer
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


class Fields:
    """The fields of a request; null counts as absent. Each is taken once, then `finish` refuses the rest."""

    def __init__(self, values: dict[str, Any], within: str | None = None) -> None:
        """`within`: the field whose value this is, for errors."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._within = "" if within is None else f"{within}."

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str) -> Any:
        """A field, unchecked; None if it is absent."""
        return self._values.pop(name, None)

    def options(self, name: str) -> "Fields":
        """The fields of an object; none if it is absent."""
        value, place = self.take(name), self._within + name
        if not isinstance(value, dict | None):
            raise bad_request(f"{place} must be an object, found {as_json(value)}", place)
        return Fields(value or {}, place)

    def flag(self, name: str) -> bool:
        """True or false; false if it is absent."""
        value, place = self.take(name), self._within + name
        if value is not None and not isinstance(value, bool):
            raise bad_request(f"{place} must be true or false, found {as_json(value)}", place)
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        return None if value is None else check_text(value, self._within + name)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number; 3.0 counts as one, as in JSON."""
        value, place = self.take(name), self._within + name
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad_request(f"{place} must be a whole number from {low} to {high}, found {as_json(value)}", place)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A finite number."""
        value = self.take(name)
        return None if value is None else check_number(value, low, high, self._within + name)

    def finish(self, ignored: Collection[str]) -> None:
        """Raises `ApiError` for fields that were not taken and are not in `ignored`."""
        unknown = [name for name in self._values if name not in ignored]
        if unknown:
            place = self._within + unknown[0]
            raise bad_request(f"{as_json(place)} is not a field that this server knows", place, "unknown_parameter")


def check_text(value: object, name: str) -> str:
    """A string that can be written as UTF-8. Raises `ApiError`."""
    if not isinstance(value, str):
        raise bad_request(f"{name} must be a string, found {as_json(value)}", name)
    if not is_text(value):
        raise bad_request(f"{name} has a lone surrogate, which is not a character", name)
    return value


def check_number(value: object, low: float, high: float, name: str) -> float:
    """A finite number in a range. Raises `ApiError`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An integer may be too large for a float; comparing the two is exact.
    if not is_number or value != value or not low <= value <= high:  # type: ignore[operator]
        raise bad_request(f"{name} must be a number from {low:g} to {high:g}, found {as_json(value)}", name)
    return float(value)  # type: ignore[arg-type]
