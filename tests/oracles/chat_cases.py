"""Random conversations in the form of OpenAI's chat API, and what chat templates get of them."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

PIECES = [
    "Hello",
    " there",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "naïve 思考",
    "👩‍👩‍👧 é",
    "{{ 7 * 7 }}",
    '{"a": [1, 2]}',
    "'quoted'",
    'it\'s "fine"',
    "\\n",
    "<b>&amp;</b>",
    "[INST]",
    "<<SYS>>",
    "<|user|>\n",
    "<tool_response>",
    "1234567",
    "\u00a0",
    "\r\n",
]
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<s>", "</s>", "<|start_header_id|>", "<|endoftext|>"]
SPECIAL += ["<｜User｜>", "<｜end▁of▁sentence｜>"]
NAMES = ["weather", "get_time", "a.b", "f-1"]


class Cases:
    """Makes conversations; `tools`, `system` and `alternates` say what the format has and demands."""

    def __init__(
        self, seed: int, *, tools: bool, system: bool = True, alternates: bool = False, calls: int = 3
    ) -> None:
        self.random = random.Random(seed)
        self.tools, self.system, self.alternates, self.calls = tools, system, alternates, calls
        self.special = self.random.random() < 0.25
        self._count = 0

    def text(self, most: int = 5) -> str:
        pieces = PIECES + (SPECIAL if self.special else [])
        return "".join(self.random.choices(pieces, k=self.random.randint(0, most)))

    def content(self) -> Any:
        if self.random.random() < 0.2:
            return [{"type": "text", "text": self.text(3)} for _ in range(self.random.randint(0, 3))]
        return self.text()

    def value(self, depth: int = 2) -> Any:
        kind = self.random.randrange(7 if depth else 5)
        if kind == 5:
            return [self.value(depth - 1) for _ in range(self.random.randint(0, 3))]
        if kind == 6:
            return {self.text(2): self.value(depth - 1) for _ in range(self.random.randint(0, 3))}
        return [self.text(2), self.random.randint(-(10**20), 10**20), self.random.uniform(-1e3, 1e30), None, True][kind]

    def tool(self, name: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {"x": {"type": "string", "enum": [self.text(2)]}, "y": self.value()}}
        function = {"name": name, "description": self.text(), "parameters": schema}
        keys = self.random.sample(list(function), k=3)
        if self.random.random() < 0.3:
            keys.remove("parameters")
        return {"type": "function", "function": {key: function[key] for key in keys}}

    def offered(self) -> list[dict[str, Any]]:
        if not self.tools or self.random.random() < 0.4:
            return []
        return [self.tool(name) for name in self.random.sample(NAMES, k=self.random.randint(1, 3))]

    def call(self) -> dict[str, Any]:
        self._count += 1
        arguments = json.dumps({self.text(1): self.value() for _ in range(self.random.randint(0, 2))})
        function = {"name": self.random.choice(NAMES), "arguments": arguments}
        return {"id": f"call_{self._count}", "type": "function", "function": function}

    def assistant(self) -> list[dict[str, Any]]:
        """A turn, with its calls and their results."""
        found: list[dict[str, Any]] = []
        while self.tools and self.random.random() < 0.4:
            calls = [self.call() for _ in range(self.random.randint(1, self.calls))]
            message: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
            if self.random.random() < 0.6:
                message["content"] = self.random.choice([None, "", self.content()])
            found.append(self.thinking(message))
            found += [{"role": "tool", "tool_call_id": call["id"], "content": self.content()} for call in calls]
        return [*found, self.thinking({"role": "assistant", "content": self.content()})]

    def thinking(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.random.random() < 0.4:
            message["reasoning_content"] = self.text()
        elif self.random.random() < 0.2 and isinstance(message.get("content"), str):
            tag = self.random.choice(["<think>\n", "", "\n<think>"])
            message["content"] = f"{tag}{self.text()}\n</think>\n\n{message['content']}"
        return message

    def conversation(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.system and self.random.random() < 0.5:
            found.append({"role": self.random.choice(["system", "developer"]), "content": self.content()})
        found.append({"role": "user", "content": self.content()})
        for _ in range(self.random.randint(0, 3)):
            found += self.assistant()
            if not self.alternates and self.random.random() < 0.15:
                found.append({"role": "system", "content": self.content()})
            found.append({"role": "user", "content": self.content()})
        if not self.alternates and self.random.random() < 0.3:  # in the middle of a turn
            found += self.assistant()[: self.random.randint(1, 3)]
        return found


def for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What servers make of such messages for templates: no parts, no missing contents, arguments as objects."""
    found = []
    for message in messages:
        given = {**message, "role": "system" if message["role"] == "developer" else message["role"]}
        content = given.get("content")
        given["content"] = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
        if calls := given.get("tool_calls"):
            given["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
                for call in calls
            ]
        found.append(given)
    return found
