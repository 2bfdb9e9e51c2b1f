"""The JSON of a request, read within limits."""

import asyncio
import gc
import json
import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final, NoReturn

from starlette.requests import ClientDisconnect, Request

from gptjax.server.errors import ApiError, bad_request, kind_of
from gptjax.server.http.sse import ClientGone
from gptjax.server.ipc.settings import Limits

_SMALL: Final = 1 << 16  # bytes; parsed in less than a millisecond
# Commas and opening brackets, also those in strings: 15 times the tokens of a context of 131,072. Three bytes of JSON
# can take 64 of memory, and Python's parser holds up all other threads while it makes them.
_MOST_MARKS: Final = 2_000_000


async def read_body(request: Request, limits: Limits, grow: Callable[[int], None]) -> bytes:
    """A request's body. `grow` is called with its size as it grows, if it is large.

    Raises:
      ApiError: it is too large (413) or too slow (408).
      ClientGone: the client left.
    """
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _read(request, limits.body_bytes, grow)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
    except ClientDisconnect:
        raise ClientGone from None


async def parse_body(data: bytes, parser: Executor) -> dict[str, Any]:
    """The JSON object in a body; a large one is parsed by `parser`. Raises `ApiError`."""
    if len(data) <= _SMALL:
        return _parse(data)
    return await asyncio.get_running_loop().run_in_executor(parser, _parse_large, data)


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
