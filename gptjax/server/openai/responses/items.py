"""The items of a response (reasoning, messages, function calls), and the events that stream them."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.chat import ChatCompletion
from gptjax.server.generation.turn import Delta, ScoredToken
from gptjax.server.openai.logprobs import chat_logprobs
from gptjax.server.openai.responses.encrypted import encrypted
from gptjax.server.openai.responses.options import Include
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import CallPart

Event = dict[str, Any]
# By kind of item: the type of its one part, and of the events of its text.
_PARTS = {
    "reasoning": ("reasoning_text", "response.reasoning_text"),
    "message": ("output_text", "response.output_text"),
}


class Items:
    """Turns a turn's text and calls into items: a new one at every change between reasoning, preamble and answer.

    Attributes:
      done: the complete items.
    """

    def __init__(self, include: Include, tokenizer: Tokenizer, namespaces: Mapping[str, tuple[str, str]]) -> None:
        """`namespaces`: as in `Tools`."""
        self.done: list[dict[str, Any]] = []
        self._include = include
        self._tokenizer = tokenizer
        self._namespaces = namespaces
        self._kind: str | None = None  # of the item that is open
        self._phase: str | None = None  # of an open message
        self._call: CallPart | None = None  # the first part of an open call
        self._id = ""
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []  # of an open message

    def add(self, delta: Delta) -> Iterator[Event]:
        """The events of more text, and then of more calls."""
        for kind, phase_of_it, text in (("reasoning", None, delta.reasoning), ("message", delta.phase, delta.text)):
            if (self._kind, self._phase) != (kind, phase_of_it):
                text = text.lstrip("\n")  # the empty line between messages, which are separate items here
            if text:
                yield from self._grow(kind, phase_of_it, text, delta.answer_tokens)
        for part in delta.calls:
            yield from self._grow_call(part)

    def finish(self, turn: ChatCompletion) -> Iterator[Event]:
        """The events of the turn's end."""
        yield from self._close("incomplete" if turn.finish_reason == "length" else "completed")

    def _grow(self, kind: str, phase: str | None, text: str, tokens: Sequence[ScoredToken]) -> Iterator[Event]:
        part, about = _PARTS[kind]
        if (self._kind, self._phase) != (kind, phase):
            yield from self._close("completed")
            self._kind, self._phase, self._text, self._logprobs = kind, phase, [], []
            self._id = f"{'rs' if kind == 'reasoning' else 'msg'}_{secrets.token_hex(12)}"
            yield self._event("response.output_item.added", item=self._item("in_progress"), inside=False)
            yield self._event("response.content_part.added", part=_part(part, "", []))
        self._text.append(text)
        wanted = kind == "message" and self._include.top_logprobs is not None
        logprobs = chat_logprobs(self._tokenizer, tokens) if wanted else []
        self._logprobs += logprobs
        yield self._event(f"{about}.delta", delta=text, **_with_logprobs(kind, logprobs))

    def _close(self, status: str) -> Iterator[Event]:
        if self._call is not None:
            yield from self._close_call(self._call, status)
        if self._kind is None:
            return
        part, about = _PARTS[self._kind]
        text = "".join(self._text)
        yield self._event(f"{about}.done", text=text, **_with_logprobs(self._kind, self._logprobs))
        yield self._event("response.content_part.done", part=_part(part, text, self._logprobs))
        item = self._item(status, text)
        yield self._event("response.output_item.done", item=item, inside=False)
        self.done.append(item)
        self._kind = self._phase = None

    def _grow_call(self, part: CallPart) -> Iterator[Event]:
        if part.begins:
            yield from self._close("completed")
            self._call, self._text, self._id = part, [], f"fc_{secrets.token_hex(12)}"
            item = self._call_item(part, "in_progress", "")
            yield self._event("response.output_item.added", item=item, inside=False)
        if part.arguments:
            self._text.append(part.arguments)
            place = {"item_id": self._id, "output_index": len(self.done)}
            yield {"type": "response.function_call_arguments.delta", **place, "delta": part.arguments}

    def _close_call(self, call: CallPart, status: str) -> Iterator[Event]:
        item = self._call_item(call, status, "".join(self._text))
        place = {"item_id": self._id, "output_index": len(self.done)}
        whole = {"name": item["name"], "arguments": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **place, **whole}
        yield self._event("response.output_item.done", item=item, inside=False)
        self.done.append(item)
        self._call = None

    def _call_item(self, call: CallPart, status: str, arguments: str) -> dict[str, Any]:
        namespace, name = self._namespaces.get(call.name, (None, call.name))
        about = {"call_id": call.id, "name": name, "status": status, "arguments": arguments}
        within = {} if namespace is None else {"namespace": namespace}
        return {"id": self._id, "type": "function_call", **within, **about}

    def _item(self, status: str, text: str | None = None) -> dict[str, Any]:
        assert self._kind is not None  # an item is open
        content = [] if text is None else [_part(_PARTS[self._kind][0], text, self._logprobs)]
        own: dict[str, Any] = {"role": "assistant", "phase": self._phase}
        if self._kind == "reasoning":
            own = {"summary": []}
            if self._include.encrypted:
                own["encrypted_content"] = encrypted(text or "")
        return {"id": self._id, "type": self._kind, **own, "status": status, "content": content}

    def _event(self, kind: str, *, inside: bool = True, **more: Any) -> Event:
        """An event of the open item, about its text (`inside`) or the whole."""
        place = {"item_id": self._id, "content_index": 0} if inside else {}
        return {"type": kind, "output_index": len(self.done), **place, **more}


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    own: dict[str, Any] = {"annotations": [], "logprobs": logprobs} if kind == "output_text" else {}
    return {"type": kind, "text": text, **own}


def _with_logprobs(kind: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"logprobs": logprobs} if kind == "message" else {}
