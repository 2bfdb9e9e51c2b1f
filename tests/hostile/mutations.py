"""Random changes of small files: of their bytes, and of the values in JSON, a safetensors header's included."""

import copy
import json
import random
from pathlib import Path
from typing import Any

from tests.gguf.made import bent

# What takes the place of any value: wrong types, huge and negative numbers, names that lead elsewhere.
VALUES: list[Any] = [
    *(0, -1, 1, 5, 7, 255, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        True,
        False,
        None,
        "",
        "a",
        "▁",
        "a b",
        "\0",
        "\x1b[2J",
        "\ud800",
        "x" * 100_000,
        "0000",
        "../../x",
        "/etc/passwd",
    ),
    *("F32", "BF16", "F8_E4M3", "float32", "gpt2", "llama", "first", "Sequence", "ByteLevel", "Metaspace"),
    *([], {}, [[]], [{}], [0], [None], [1 << 40, 1 << 40], [-1], [0, 16], ["a", "b"], {"a": 1}, {"type": "Sequence"}),
]
NAMES = ["x", "shape", "dtype", "a/b", "\ud800", "\x1b", "id", "content", "type", "eos_token_id", "rope_scaling"]
DEEP = '"nested": ' + "[" * 50_000 + "]" * 50_000


def changed(pick: random.Random, name: str, data: bytes) -> bytes:
    """A file's bytes with random changes, which leave half of the JSON files valid JSON."""
    kind = Path(name).suffix
    if kind in (".json", ".zarray") or name.endswith(".zarray"):
        return bent(pick, data) if pick.random() < 0.4 else edited(pick, data)
    if kind == ".safetensors" and pick.random() < 0.6:
        size = int.from_bytes(data[:8], "little")
        header = edited(pick, data[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    if name == "journal" and pick.random() < 0.6:
        lines = data.splitlines()
        line = pick.randrange(len(lines))
        return b"\n".join([*lines[:line], edited(pick, lines[line]), *lines[line + 1 :], b""])
    return bent(pick, data)


def edited(pick: random.Random, data: bytes) -> bytes:
    """JSON with one to three values removed, added or replaced."""
    value = json.loads(data)
    for _ in range(pick.choice((1, 1, 1, 3))):
        _edit(pick, value)
    text = json.dumps(value, ensure_ascii=pick.random() < 0.9)
    if pick.random() < 0.01:
        text = text[:-1] + ("" if text == "{}" else ", ") + DEEP + text[-1]
    if pick.random() < 0.02 and len(text) > 2:  # a key twice
        text = text[:-1] + ", " + text[1:]
    return text.encode(errors="surrogatepass")


def _edit(pick: random.Random, value: Any) -> None:
    node = value
    while True:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            return
        place = pick.choice(places)
        inner = node[place]
        if not isinstance(inner, dict | list) or not inner or pick.random() < 0.2:
            break
        node = inner
    kind, new = pick.random(), copy.deepcopy(pick.choice(VALUES))
    if kind < 0.15:
        del node[place]
    elif kind < 0.3 and isinstance(node, dict):
        node[pick.choice(NAMES)] = new
    elif kind < 0.4:
        node[place] = copy.deepcopy(node[pick.choice(places)])
    elif kind < 0.5 and isinstance(node, list):
        node.append(pick.choice((new, copy.deepcopy(inner))))
    elif kind < 0.6 and type(inner) is int:
        node[place] = inner + pick.choice((-1, 1, 1 << 32, 1 << 63))
    else:
        node[place] = new
