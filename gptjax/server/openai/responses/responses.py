"""`POST /v1/responses`: one turn of a conversation, as items, for chat models."""

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gptjax.chat import ChatCompletion
from gptjax.engine.request import check_prompt
from gptjax.errors import GptjaxError
from gptjax.server.errors import ApiError, as_json, bad_request, of_gptjax
from gptjax.server.generation.answering import answered
from gptjax.server.generation.response_store import ResponseStore
from gptjax.server.generation.served import Served
from gptjax.server.generation.service import Service
from gptjax.server.generation.shared_fields import (
    MOST_TOKENS,
    WITHOUT_EFFECT,
    fitted,
    read_reasoning,
    read_sampling,
    read_thinking,
)
from gptjax.server.generation.turn import joined as joined_deltas
from gptjax.server.generation.turn import running_turn
from gptjax.server.http.fields import Fields
from gptjax.server.openai.responses.input import Input, joined, read_input
from gptjax.server.openai.responses.items import Items
from gptjax.server.openai.responses.memory import Kept, read_memory
from gptjax.server.openai.responses.options import (
    Include,
    check_repeated,
    read_include,
    read_repeated,
    read_text,
    read_truncation,
    repeated_tools,
)
from gptjax.server.openai.responses.tools import WARNING, Tools, read_tools
from gptjax.server.openai.responses.truncation import fitting
from gptjax.structured.wishes import grammar_of_turn
from gptjax.text.chat_formats import ChatOptions

# Unsupported fields, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
}
_WITHOUT_EFFECT = WITHOUT_EFFECT | {"max_tool_calls", "stream_options"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, checked."""

    prompt_ids: tuple[int, ...]
    how: ChatOptions
    options: dict[str, Any]
    stream: bool
    include: Include
    repeated: dict[str, Any]  # fields of the request that its answer repeats
    kept: Kept | None  # what is stored with the answer; None: it is not stored
    tools: Tools


def read(values: dict[str, Any], served: Served, store: ResponseStore) -> Asked:
    """Reads a request's fields. Raises `ApiError` for the first invalid one."""
    fields = Fields(values)
    served.check_name(fields.text("model"))
    chat_format = served.chat()
    for name, neutral in _NEUTRAL.items():
        value = fields.take(name)
        if value is not None and value not in neutral:
            raise bad_request(f"{name} {as_json(value)} is not supported", name, "unsupported")
    stream, include, truncation = fields.flag("stream"), read_include(fields), read_truncation(fields)
    repeated = read_repeated(fields)
    options = read_sampling(fields)
    max_tokens = fields.whole("max_output_tokens", 1, MOST_TOKENS)
    text, answer, about = read_text(fields)
    given_effort, thinking = read_reasoning(fields), read_thinking(fields)
    effort, thinking = fitted(chat_format, given_effort, thinking, name="reasoning.effort")
    if effort is None and "reasoning_effort" in chat_format.options:
        effort = "medium"
    tools = read_tools(fields.take("tools"))
    choice, instructions = fields.take("tool_choice"), fields.text("instructions")
    memory = read_memory(fields, store)
    given = read_input(memory.items, instructions, before=len(memory.earlier))
    if chat_format.one_message_a_turn:
        given = joined(given)
    fields.finish(_WITHOUT_EFFECT)
    repeated |= {
        "instructions": instructions,
        "max_output_tokens": max_tokens,
        "reasoning": {"effort": effort, "summary": None},
        "temperature": options.get("temperature"),
        "text": text,
        "tools": repeated_tools(values.get("tools")),
        "tool_choice": choice or "auto",
        "top_logprobs": include.top_logprobs or 0,
        "top_p": options.get("top_p"),
        "truncation": truncation,
        "previous_response_id": memory.previous,
    }
    check_repeated(repeated)
    served.check_size(tools.offered, "tools")
    how = ChatOptions(
        tools=[] if choice == "none" else tools.offered,
        reasoning_effort=effort,
        enable_thinking=thinking,
        response_format=about,
        parallel_tool_calls=repeated["parallel_tool_calls"],
    )
    if truncation == "auto":
        given = given.only(fitting(given.messages, how, served, max_tokens))
    served.check_size([given.messages, tools.offered], "input")
    prompt_ids = _rendered(given, how, tools, served)
    try:
        strict = dataclasses.replace(how, tools=tools.with_strict()) if how.tools else how
        grammar = grammar_of_turn(chat_format, served.text(), strict, None, choice, answer)
    except GptjaxError as error:
        raise of_gptjax(tools.explained(error)) from None
    options |= {
        "max_tokens": served.max_length if max_tokens is None else max_tokens,
        "grammar": grammar,
        "top_logprobs": include.top_logprobs or 0,
    }
    return Asked(prompt_ids, how, options, stream, include, repeated, memory.kept(), tools)


def _rendered(given: Input, how: ChatOptions, tools: Tools, served: Served) -> tuple[int, ...]:
    try:
        prompt_ids = served.chat().render(given.messages, served.text(), how, max_length=served.max_length)
    except GptjaxError as error:
        raise given.explained(tools.explained(error)) from None
    try:
        return check_prompt(prompt_ids, vocab_size=served.vocab_size, max_length=served.max_length)
    except GptjaxError as error:
        raise of_gptjax(error, "input") from None


async def respond(request: Request) -> Response:
    """Answers a request. A header names the tools that were left out."""
    left_out: list[str] = []

    def read_tools_too(values: dict[str, Any], service: Service) -> Asked:
        asked = read(values, service.served, service.stored)
        left_out.extend(asked.tools.left_out)
        return asked

    response = await answered(request, read_tools_too, Answer)
    if left_out:
        response.headers[WARNING] = f"left out, as this server runs no tools itself: {', '.join(left_out)}"
    return response


class Answer:
    """The answer to a request."""

    def __init__(self, service: Service, asked: Asked) -> None:
        served = service.served
        self.streams = asked.stream
        self._turn, self._generation = running_turn(service, asked.prompt_ids, asked.how, asked.options)
        self._asked = asked
        self._items = Items(asked.include, served.text(), asked.tools.namespaces)
        self._result: ChatCompletion | None = None
        self._error: ApiError | None = None
        self._count = 0  # of events
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": served.name,
            **asked.repeated,
            "background": False,
        }

    def start(self) -> None:
        """Submits the prompt. Raises `ApiError`."""
        self._generation.start()

    def close(self) -> None:
        """Cancels whatever is still running."""
        self._generation.close()

    async def whole(self) -> dict[str, Any]:
        """Returns the answer in one piece."""
        async for _ in self._events():
            pass
        return self._response()

    async def stream(self) -> AsyncGenerator[object, None]:
        """Yields the answer as numbered events."""
        async for event in self._with_ends():
            yield self._numbered(event)

    def failure(self, error: ApiError) -> Iterable[object]:
        """An error within a stream: some clients raise the `error` event, others wait for the response."""
        self._error = error
        fields = {"code": error.code or error.kind, "message": str(error), "param": error.param}
        yield self._numbered({"type": "error", **fields, **error.body()})
        yield self._numbered({"type": "response.failed", "response": self._response()})

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        return {**event, "sequence_number": self._count - 1}

    async def _with_ends(self) -> AsyncGenerator[dict[str, Any], None]:
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._response()}
        async for event in self._events():
            yield event
        response = self._response()
        yield {"type": f"response.{response['status']}", "response": response}

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of the items; then the response is stored."""
        async for _, deltas in self._generation.results():
            for delta in joined_deltas(deltas):
                for event in self._items.add(delta):
                    yield event
                if delta.whole is not None:
                    self._result = delta.whole
                    for event in self._items.finish(delta.whole):
                        yield event
        if self._asked.kept is not None:
            self._asked.kept.remember(self._response())  # before clients know its end

    def _response(self) -> dict[str, Any]:
        """The response object in its current state."""
        status, details, usage, error = "in_progress", None, None, None
        if self._error is not None:
            # The only one of OpenAI's codes that fits; its clients retry.
            status, error = "failed", {"code": "server_error", "message": str(self._error)}
        elif self._result is not None:
            status = "completed"
            usage = self._usage(self._result)
            if self._result.finish_reason == "length":
                status, details = "incomplete", {"reason": "max_output_tokens"}
        return {
            **self._head,
            "store": self._asked.kept is not None and self._error is None,
            "status": status,
            "error": error,
            "incomplete_details": details,
            "output": list(self._items.done),
            "usage": usage,
        }

    def _usage(self, result: ChatCompletion) -> dict[str, Any]:
        usage = result.completion.usage
        return {
            "input_tokens": usage.prompt_tokens,
            # Writing to the cache costs nothing here.
            "input_tokens_details": {"cached_tokens": self._generation.cached_tokens(), "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._turn.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }
