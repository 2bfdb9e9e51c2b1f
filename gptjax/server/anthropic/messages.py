"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API, for chat models."""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from gptjax.chat import ChatCompletion
from gptjax.engine.request import CheckedIds, check_prompt
from gptjax.errors import CapacityError, GptjaxError
from gptjax.server.anthropic.blocks import Blocks
from gptjax.server.anthropic.conversation import (
    read_conversation,
    read_tool_choice,
    read_tools,
    references,
)
from gptjax.server.anthropic.errors import body, too_long
from gptjax.server.anthropic.options import Thinking, options_of, read_output_config, read_thinking
from gptjax.server.errors import ApiError, as_json, bad_request, of_gptjax
from gptjax.server.generation.answering import answered, reading
from gptjax.server.generation.served import Served
from gptjax.server.generation.service import Service
from gptjax.server.generation.shared_fields import MOST_TOKENS, read_sampling
from gptjax.server.generation.turn import joined as joined_deltas
from gptjax.server.generation.turn import running_turn
from gptjax.server.http.fields import Fields
from gptjax.server.http.sse import EventStream, json_response, unless_gone
from gptjax.server.openai.responses.tools import Tools
from gptjax.structured import Grammar
from gptjax.structured.wishes import grammar_of_turn
from gptjax.text.chat_formats import ChatOptions

# Fields that do not change an answer here.
_WITHOUT_EFFECT: Final = frozenset(
    """cache_control context_management diagnostics inference_geo metadata service_tier
    speed user_profile_id workspace_id""".split()
)
# Unsupported fields, with the values that ask for nothing.
_NEUTRAL: Final[dict[str, object]] = {"container": {}, "mcp_servers": []}
_COUNTED: Final = 4  # contexts: longer prompts are refused before they are counted to the end
_STOP_REASONS: Final = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model is to read, which may be longer than it can."""

    ids: list[int]
    how: ChatOptions
    thinking: Thinking
    grammar: Grammar | None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, checked."""

    prompt_ids: CheckedIds
    prompt: Prompt
    options: dict[str, Any]
    max_tokens: int
    stream: bool
    edits_context: bool  # the answer is to say which edits were made: none


def read(values: dict[str, Any], served: Served) -> Asked:
    """Reads a request's fields. Raises `ApiError` for the first invalid one."""
    fields = Fields(values)
    prompt = _read_prompt(fields, served)
    stream, options = fields.flag("stream"), read_sampling(fields, stop="stop_sequences")
    max_tokens = fields.whole("max_tokens", 1, MOST_TOKENS)
    if max_tokens is None:
        raise bad_request("max_tokens is missing", "max_tokens")
    fields.finish(_WITHOUT_EFFECT)
    if len(prompt.ids) > served.max_length:
        raise too_long(len(prompt.ids), served.max_length)
    try:
        checked = check_prompt(prompt.ids, vocab_size=served.vocab_size, max_length=served.max_length)
    except GptjaxError as error:
        raise of_gptjax(error, "messages") from None
    options |= {"max_tokens": max_tokens, "grammar": prompt.grammar}
    return Asked(checked, prompt, options, max_tokens, stream, "context_management" in fields)


def _read_prompt(fields: Fields, served: Served) -> Prompt:
    """The fields that a prompt is made of."""
    served.check_name(fields.text("model"))
    chat_format, tokenizer = served.chat(), served.text()
    for name, neutral in _NEUTRAL.items():
        value = fields.take(name)
        if value is not None and value != neutral:
            raise bad_request(f"{name} {as_json(value)} is not supported", name, "unsupported")
    thinking = read_thinking(fields)
    effort, answer, about = read_output_config(fields)
    messages = fields.take("messages")
    one = chat_format.one_message_a_turn
    conversation = read_conversation(fields.take("system"), messages, one_message_a_turn=one)
    given = conversation.given
    tools, (choice, parallel) = read_tools(fields.take("tools"), references(messages)), read_tool_choice(fields)
    tools = Tools() if choice == "none" else tools
    most = _COUNTED * served.max_length
    _, least = served.least_tokens([given.messages, tools.offered])
    if least > most:
        raise too_long(least, served.max_length, at_least=True)
    how = options_of(chat_format, thinking, conversation.effort or effort)
    how = dataclasses.replace(how, tools=tools.offered, response_format=about, parallel_tool_calls=parallel)
    try:
        ids = chat_format.render(given.messages, tokenizer, how, max_length=most)
        strict = dataclasses.replace(how, tools=tools.with_strict())
        grammar = grammar_of_turn(chat_format, tokenizer, strict, None, choice, answer)
    except CapacityError:
        raise too_long(most + 1, served.max_length, at_least=True) from None
    except GptjaxError as error:
        raise conversation.explained(tools.explained(error)) from None
    return Prompt(ids, how, thinking, grammar)


async def respond(request: Request) -> Response:
    """Answers a request."""
    return await answered(request, lambda values, service: read(values, service.served), Answer, stream=MessageStream)


async def count_tokens(request: Request) -> Response:
    """Counts the tokens of what would be a prompt."""
    service: Service = request.app.state.service

    def count(values: dict[str, Any]) -> int:
        fields = Fields(values)
        prompt = _read_prompt(fields, service.served)
        fields.finish(_WITHOUT_EFFECT)
        return len(prompt.ids)

    async with reading(request, service) as values:
        counted = await unless_gone(request, asyncio.to_thread(count, values))
    return json_response({"input_tokens": counted})


class MessageStream(EventStream):
    """Events as Anthropic's API sends them."""

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    end = b""


class Answer:
    """The answer to a request."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._asked = asked
        self.streams = asked.stream
        self._turn, self._generation = running_turn(service, asked.prompt_ids, asked.prompt.how, asked.options)
        self._blocks = Blocks(asked.prompt.thinking, service.served.text())
        self._result: ChatCompletion | None = None
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.served.name,
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
        return self._message()

    async def stream(self) -> AsyncGenerator[object, None]:
        """Yields the answer's events."""
        yield {"type": "message_start", "message": self._message()}
        async for event in self._events():
            yield event
        yield {"type": "message_delta", "delta": self._end(), "usage": self._usage(), **self._edits()}
        yield {"type": "message_stop"}

    def failure(self, error: ApiError) -> Iterable[object]:
        """The event that reports an error within a stream."""
        yield body(error)

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of the blocks."""
        async for _, deltas in self._generation.results():
            for delta in joined_deltas(deltas):
                for event in self._blocks.add(delta):
                    yield event
                if delta.whole is not None:
                    self._result = delta.whole
                    for event in self._blocks.finish(delta.whole):
                        yield event

    def _message(self) -> dict[str, Any]:
        """The message in its current state."""
        content = list(self._blocks.done)
        return {**self._head, "content": content, **self._end(), "usage": self._usage(), **self._edits()}

    def _edits(self) -> dict[str, Any]:
        return {"context_management": {"applied_edits": []}} if self._asked.edits_context else {}

    def _end(self) -> dict[str, Any]:
        """Why the turn has ended, if it has."""
        reason, stop = None, None
        if self._result is not None:
            completion = self._result.completion
            reason, stop = _STOP_REASONS[self._result.finish_reason], completion.stop
            if stop is not None and not self._result.tool_calls:
                reason = "stop_sequence"
            elif reason == "max_tokens" and completion.usage.completion_tokens < self._asked.max_tokens:
                reason = "model_context_window_exceeded"
        stop = stop if reason == "stop_sequence" else None
        return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None}

    def _usage(self) -> dict[str, Any]:
        """The usage so far; what was read from the cache is known at the end only."""
        cached = self._generation.cached_tokens()
        return {
            "input_tokens": len(self._asked.prompt_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": 0 if self._result is None else self._result.completion.usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._turn.reasoning_tokens},
        }
