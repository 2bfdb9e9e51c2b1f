"""`POST /v1/responses`: a turn of a conversation as items, for models that speak harmony. Nothing is stored."""

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gptjax import chat
from gptjax.chat import TODAY, ChatCompletion, TurnReader
from gptjax.engine.options import make_request
from gptjax.engine.request import check_prompt
from gptjax.errors import GptjaxError
from gptjax.server.answering import answered
from gptjax.server.body import Fields
from gptjax.server.errors import bad_request, of_gptjax
from gptjax.server.generation import Generation, Row, usage_json
from gptjax.server.items import Items
from gptjax.server.responses_input import read_messages, read_tools
from gptjax.server.schema import MOST_TOKENS, WITHOUT_EFFECT, read_sampling
from gptjax.server.service import Served, Service
from gptjax.server.turn import Turn

# What would have to be stored, or computed otherwise, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "conversation": (),
    "parallel_tool_calls": (True, False),  # the models make one call at a time
    "previous_response_id": (),
    "prompt": (),
    "tool_choice": ("auto", "none"),
    "truncation": ("disabled",),
}
_WITHOUT_EFFECT = WITHOUT_EFFECT | {"include", "max_tool_calls", "stream_options"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, checked."""

    prompt_ids: tuple[int, ...]
    offered: frozenset[str]  # names of tools that may be called
    options: dict[str, Any]
    stream: bool
    repeated: dict[str, Any]  # fields of the request that its answer repeats


def read(values: dict[str, Any], served: Served) -> Asked:
    """A request's fields. Raises `ApiError` for the first that is not as it should be."""
    fields = Fields(values)
    served.check_name(fields.text("model"))
    tokenizer = served.chat_tokenizer()
    repeated = {name: values.get(name) for name in ("instructions", "metadata", "temperature", "top_p", "user")}
    for name, neutral in _NEUTRAL.items():
        value = fields.take(name)
        if value is not None and value not in neutral:
            raise bad_request(f"{name} {repr(value)[:60]} is not supported", name, "unsupported")
    stream = fields.flag("stream")
    options = read_sampling(fields)
    max_tokens = fields.whole("max_output_tokens", 1, MOST_TOKENS)
    _check_text(fields)
    effort = _read_effort(fields)
    tools = read_tools(fields.take("tools"))
    messages = read_messages(fields.take("input"), fields.text("instructions"))
    fields.finish(_WITHOUT_EFFECT)
    served.check_size([messages, tools], "input")
    offered = [] if values.get("tool_choice") == "none" else tools
    try:
        prompt_ids = chat.prompt(
            messages,
            tokenizer,
            tools=offered,
            reasoning_effort=effort,
            current_date=TODAY,
            max_length=served.max_length,
        )
        check_prompt(prompt_ids, vocab_size=served.vocab_size, max_length=served.max_length)
    except GptjaxError as error:
        raise of_gptjax(error, "input") from None
    options |= {"max_tokens": served.max_length if max_tokens is None else max_tokens}
    repeated |= {
        "max_output_tokens": max_tokens,
        "reasoning": {"effort": effort, "summary": None},
        "tools": values.get("tools") or [],
        "tool_choice": values.get("tool_choice") or "auto",
    }
    return Asked(tuple(prompt_ids), chat.offered_names(offered), options, stream, repeated)


def _check_text(fields: Fields) -> None:
    given = fields.take("text")
    if given is None:
        return
    if not isinstance(given, dict):
        raise bad_request("text must be an object", "text")
    options = Fields(given)
    form = options.take("format")
    kind = form.get("type") if isinstance(form, dict) else form
    if kind not in (None, "text"):
        raise bad_request(f"text.format {repr(kind)[:60]} is not supported; only 'text' is", "text", "unsupported")
    options.finish({"verbosity"})


def _read_effort(fields: Fields) -> str:
    given = fields.take("reasoning")
    if given is None:
        return "medium"
    if not isinstance(given, dict):
        raise bad_request("reasoning must be an object", "reasoning")
    options = Fields(given)
    effort = options.text("effort")
    options.finish({"summary", "generate_summary"})
    return effort or "medium"


async def respond(request: Request) -> Response:
    """Answers a request."""
    return await answered(request, lambda values, service: read(values, service.served), Answer)


class Answer:
    """What becomes of a request."""

    def __init__(self, service: Service, asked: Asked) -> None:
        served = service.served
        self.streams = asked.stream
        tokenizer = served.chat_tokenizer()
        self._turn = Turn(TurnReader(tokenizer, offered=asked.offered), tokenizer)
        try:
            asked_for = make_request(asked.prompt_ids, asked.options, served.defaults, served.turn_ends(tokenizer))
        except GptjaxError as error:
            raise of_gptjax(error) from None
        self._generation = Generation(service, [Row(asked_for, self._turn.reader)])
        self._items = Items()
        self._result: ChatCompletion | None = None
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": served.name,
            **asked.repeated,
            "background": False,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
        }

    def start(self) -> None:
        """Submits the prompt. Raises `ApiError`."""
        self._generation.start()

    def close(self) -> None:
        """Cancels what is still under way."""
        self._generation.close()

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async for _ in self._events():
            pass
        return self._response()

    async def stream(self) -> AsyncGenerator[object, None]:
        """The answer as events, numbered."""
        number = 0
        async for event in self._with_ends():
            yield {**event, "sequence_number": number}
            number += 1

    async def _with_ends(self) -> AsyncGenerator[dict[str, Any], None]:
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._response()}
        async for event in self._events():
            yield event
        response = self._response()
        yield {"type": f"response.{response['status']}", "response": response}

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of the items."""
        async for _, chunk in self._generation.chunks():
            delta = self._turn.add(chunk)
            for event in self._items.add(delta.reasoning, delta.text):
                yield event
            if delta.whole is not None:
                self._result = delta.whole
                for event in self._items.finish(delta.whole):
                    yield event

    def _response(self) -> dict[str, Any]:
        """The object as it is now."""
        status, details, usage = "in_progress", None, None
        if self._result is not None:
            status = "completed"
            usage = self._usage(self._result)
            if self._result.finish_reason == "length":
                status, details = "incomplete", {"reason": "max_output_tokens"}
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "output": list(self._items.done),
            "usage": usage,
        }

    def _usage(self, result: ChatCompletion) -> dict[str, Any]:
        usage = result.completion.usage
        found = usage_json([usage], choices=1, cached=self._generation.cached_tokens())
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": found["prompt_tokens_details"],
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._turn.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }
