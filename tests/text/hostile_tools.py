"""Renders random tools of the kinds whose text becomes much larger than they are, and prints what the worst cost.

Run by test_harmony_bounds.py as `python -m tests.text.hostile_tools COUNT LARGEST SEED`, with little memory.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from gptjax.errors import GptjaxError
from gptjax.text.harmony import render
from tests.text.harmony_material import TALES, USER, function

Schema = dict[str, Any]
_ADDRESSES = 1500 << 20  # bytes; more is a MemoryError or an abort


def _scalar(pick: random.Random, size: int) -> Any:
    """A value of about this size in JSON; a long one is of a kind whose text can become longer."""
    unit = pick.choice(["a", " ", "\n", "ab\n", '"', "\x01", "1,", "é", "東", "\r\n", "x y "])
    return pick.choice([1, -1.5, True, None, "", 10**300, 1e308, 1e-5, 2**64, unit * max(size // len(unit), 0)])


def _array(pick: random.Random, size: int) -> Any:
    item = pick.choice([1, "", "a", None, [], {}, 1e300, "\n"])
    value: Any = [item] * size
    for _ in range(pick.choice([0, 0, 1, 20, 55])):
        value = pick.choice([[value], {"k": value}])
    return value


def _wide(pick: random.Random, size: int) -> Schema:
    """Much at one level."""
    leaf = pick.choice([{}, True, {"type": "string"}, {"nullable": True}, {"default": ""}, {"description": "\n"}])
    kinds: list[Callable[[], Schema]] = [
        lambda: {"oneOf": [leaf] * size},
        lambda: {"type": "object", "properties": {str(number): leaf for number in range(size)}},
        lambda: {"type": [""] * size},
        lambda: {"type": "string", "enum": [""] * size},
        lambda: {"type": "object", "properties": {"a": {"examples": [""] * size, "default": _array(pick, size)}}},
        lambda: {"type": "object", "required": ["a"] * size, "properties": {"a" * size: leaf}},
        lambda: {"type": "object", "description": _scalar(pick, 3 * size), "properties": {"a": {"title": "a" * size}}},
        lambda: {"anyOf": [leaf] * size, "$defs": {"a" * size: _array(pick, size)}},
        lambda: {"default": _scalar(pick, 3 * size), "type": "string", "enum": ["a"]},
    ]
    return pick.choice(kinds)()


def _deep(pick: random.Random, size: int) -> Schema:
    """Levels around it, each with a part of its own."""
    depth = pick.choice([0, 1, 5, 15, 28, 31, 40])
    schema = _wide(pick, max(size // (depth + 1), 1))
    for _ in range(depth):
        own = _wide(pick, max(size // (depth + 1), 1)) if pick.random() < 0.7 else {}
        name = pick.choice(["a", "a", "n" * 40, "n" * max(size // (depth + 1), 1)])
        around: list[Schema] = [
            {**own, "oneOf": [*own.get("oneOf", []), schema], "nullable": True},
            {**own, "type": "object", "properties": {**own.get("properties", {}), name: schema}},
            {**own, "type": "array", "items": schema, "nullable": True},
        ]
        schema = pick.choice(around)
    return schema


def _tools(pick: random.Random, size: int) -> list[Any]:
    if pick.random() < 0.1:
        return [function(f"f{number}", description=pick.choice(["", "\n", "a"])) for number in range(size // 4)]
    count = pick.choice([1, 1, 1, 2, 30])
    return [
        function(f"f{number}", description=_scalar(pick, size // count), parameters=_deep(pick, size // count))
        for number in range(count)
    ]


def main(count: int, largest: int, seed: int) -> None:
    """Prints JSON: the most seconds, the growth of the memory in MB, and how many tools there was room for."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    pick = random.Random(seed)
    render([USER], TALES, [function()])
    before, slowest, fitted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, 0
    for _ in range(count):
        tools = _tools(pick, int(largest ** pick.random()))
        start = time.thread_time()
        try:
            render([USER], TALES, tools, max_length=pick.choice([512, 4096, 131_072]))
            fitted += 1
        except GptjaxError as error:
            assert len(str(error)) < 1000, str(error)[:2000]
        slowest = max(slowest, time.thread_time() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"seconds": slowest, "megabytes": grown, "fitted": fitted}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
