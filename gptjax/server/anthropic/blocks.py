"""The content blocks of a turn (thinking, text, tool_use), and the events that stream them."""

import json
from collections.abc import Iterator
from typing import Any, Final

from gptjax.chat import ChatCompletion
from gptjax.server.anthropic.options import Thinking
from gptjax.server.generation.turn import Delta
from gptjax.server.openai.responses.encrypted import encrypted
from gptjax.server.openai.responses.items import Items
from gptjax.server.openai.responses.options import Include
from gptjax.text import Tokenizer
from gptjax.text.chat_formats.conversation import normal_arguments

Event = dict[str, Any]
# The key that Anthropic's API advises for arguments that are not a JSON object, so that they can be sent back.
_INVALID: Final = "INVALID_JSON"


class Blocks:
    """Turns a turn's text into blocks, one for each item of `/v1/responses`.

    Attributes:
      done: the complete blocks.
    """

    def __init__(self, thinking: Thinking, tokenizer: Tokenizer) -> None:
        self.done: list[dict[str, Any]] = []
        self._thinking = thinking
        self._items = Items(Include(), tokenizer, {})

    def add(self, delta: Delta) -> Iterator[Event]:
        """The events of more text."""
        yield from self._translated(self._items.add(delta))

    def finish(self, turn: ChatCompletion) -> Iterator[Event]:
        """The events of the turn's end, including its calls."""
        yield from self._translated(self._items.finish(turn))

    def _translated(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            match event["type"]:
                case "response.output_item.added":
                    if not self._is_left_out(event["item"]):
                        yield self._event("content_block_start", content_block=_begun(event["item"]))
                case "response.reasoning_text.delta":
                    if self._thinking.is_shown and not self._thinking.is_left_out:
                        yield self._delta("thinking_delta", thinking=event["delta"])
                case "response.output_text.delta":
                    yield self._delta("text_delta", text=event["delta"])
                case "response.output_item.done":
                    if not self._is_left_out(event["item"]):
                        yield from self._end(event["item"])

    def _end(self, item: dict[str, Any]) -> Iterator[Event]:
        """The last events of a block. A call's arguments come in one piece, once it is known that they are JSON."""
        block = _begun(item)
        if item["type"] == "function_call":
            block["input"] = _input(item["arguments"])
            yield self._delta("input_json_delta", partial_json=json.dumps(block["input"], ensure_ascii=False))
        elif item["type"] == "message":
            block["text"] = item["content"][0]["text"]
        else:
            text = item["content"][0]["text"]
            block |= {"thinking": text if self._thinking.is_shown else "", "signature": encrypted(text)}
            yield self._delta("signature_delta", signature=block["signature"])
        yield self._event("content_block_stop")
        self.done.append(block)

    def _is_left_out(self, item: dict[str, Any]) -> bool:
        return item["type"] == "reasoning" and self._thinking.is_left_out

    def _delta(self, kind: str, **more: Any) -> Event:
        return self._event("content_block_delta", delta={"type": kind, **more})

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": kind, "index": len(self.done), **more}


def _begun(item: dict[str, Any]) -> dict[str, Any]:
    """The block of an item, still empty."""
    match item["type"]:
        case "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "message":
            return {"type": "text", "text": "", "citations": None}
        case _:
            return {"type": "tool_use", "id": item["call_id"], "name": item["name"], "input": {}}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; what the model wrote may be malformed."""
    normal = normal_arguments(arguments)
    found: dict[str, Any] = {_INVALID: arguments} if normal is None else json.loads(normal)
    return found
