"""`POST /v1/chat/completions`: the next turn of a conversation, for chat models."""

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gptjax.chat import ChatCompletion
from gptjax.engine.options import make_request
from gptjax.engine.request import MAX_TOP_LOGPROBS, check_prompt
from gptjax.errors import GptjaxError
from gptjax.server.errors import ApiError, as_json, bad_request, of_gptjax
from gptjax.server.generation.answering import answered
from gptjax.server.generation.generation import Generation, Row
from gptjax.server.generation.served import Served
from gptjax.server.generation.service import Service
from gptjax.server.generation.shared_fields import (
    MOST_CHOICES,
    MOST_TOKENS,
    WITHOUT_EFFECT,
    Stream,
    fitted,
    read_effort,
    read_guided,
    read_parallel,
    read_sampling,
    read_stream,
    read_thinking,
    seed_of_choice,
)
from gptjax.server.generation.turn import Delta, Turn, joined
from gptjax.server.http.fields import Fields
from gptjax.server.openai.logprobs import chat_logprobs
from gptjax.server.openai.usage import usage_json
from gptjax.structured import Grammar
from gptjax.structured.wishes import described, grammar_of_turn, read_response_format
from gptjax.text.chat_formats import CallPart, ChatOptions, ToolCall

# Further fields about tools and the answer's form, with the values that ask for nothing.
_NEUTRAL = {
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, checked."""

    prompt_ids: tuple[int, ...]
    how: ChatOptions
    choices: int
    options: dict[str, Any]
    logprobs: int | None  # alternatives for each token of the answer; None: no log-probabilities
    stream: Stream


def read(values: dict[str, Any], served: Served) -> Asked:
    """Reads a request's fields. Raises `ApiError` for the first invalid one."""
    fields = Fields(values)
    served.check_name(fields.text("model"))
    served.chat()  # before anything else is checked
    _check_neutral(fields)
    choices = fields.whole("n", 1, MOST_CHOICES) or 1
    logprobs = _read_logprobs(fields)
    stream = read_stream(fields)
    options = read_sampling(fields)
    limits = [fields.whole(name, 1, MOST_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    messages = fields.take("messages")
    prompt_ids, how, grammar = _render(fields, messages, served)
    fields.finish(WITHOUT_EFFECT)
    try:
        checked = check_prompt(prompt_ids, vocab_size=served.vocab_size, max_length=served.max_length)
    except GptjaxError as error:
        raise of_gptjax(error, "messages") from None
    # Without a limit, a turn may use all the room there is.
    given = [limit for limit in limits if limit is not None]
    options |= {"max_tokens": min(given, default=served.max_length), "top_logprobs": logprobs or 0, "grammar": grammar}
    return Asked(checked, how, choices, options, logprobs, stream)


def _render(fields: Fields, messages: object, served: Served) -> tuple[list[int], ChatOptions, Grammar | None]:
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a list of at least one message", "messages")
    tools = fields.take("tools")
    if tools is not None and not isinstance(tools, list):
        raise bad_request("tools must be a list", "tools")
    served.check_size([messages, tools], "messages")
    choice, given, guided = fields.take("tool_choice"), fields.take("response_format"), read_guided(fields)
    effort, thinking = fitted(served.chat(), read_effort(fields), read_thinking(fields))
    try:
        form = read_response_format(given)
        how = ChatOptions(
            tools=[] if choice == "none" else tools or [],
            reasoning_effort=effort,
            enable_thinking=thinking,
            response_format=described(given),
            parallel_tool_calls=read_parallel(fields),
        )
        prompt_ids = served.chat().render(messages, served.text(), how, max_length=served.max_length)
        return prompt_ids, how, grammar_of_turn(served.chat(), served.text(), how, form, choice, guided)
    except GptjaxError as error:
        raise of_gptjax(error) from None


def _check_neutral(fields: Fields) -> None:
    """Raises `ApiError` for unsupported requests about a turn."""
    for name, neutral in _NEUTRAL.items():
        value = fields.take(name)
        if value is not None and value not in neutral:
            raise bad_request(f"{name} {as_json(value)} is not supported", name, "unsupported")


def _read_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    count = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if count is not None and not wanted:
        raise bad_request("top_logprobs requires logprobs: true", "top_logprobs")
    return (count or 0) if wanted else None


async def respond(request: Request) -> Response:
    """Answers a request."""
    return await answered(request, lambda values, service: read(values, service.served), Answer)


class Answer:
    """The answer to a request."""

    def __init__(self, service: Service, asked: Asked) -> None:
        served = service.served
        self._asked = asked
        self.streams = asked.stream.wanted
        self._tokenizer = served.text()
        readers = [served.chat().reader(self._tokenizer, asked.how) for _ in range(asked.choices)]
        self._turns = [Turn(reader, self._tokenizer) for reader in readers]
        ends = served.turn_ends()
        try:
            rows = [
                Row(
                    make_request(asked.prompt_ids, seed_of_choice(asked.options, choice), served.defaults, ends),
                    turn.reader,
                    turn.add,
                )
                for choice, turn in enumerate(self._turns)
            ]
        except GptjaxError as error:
            raise of_gptjax(error) from None
        self._generation = Generation(service, rows)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": served.name,
        }

    def start(self) -> None:
        """Submits the prompt. Raises `ApiError`."""
        self._generation.start()

    def close(self) -> None:
        """Cancels whatever is still running."""
        self._generation.close()

    async def whole(self) -> dict[str, Any]:
        """Returns the answer in one piece."""
        turns: dict[int, ChatCompletion] = {}
        tokens: list[list[dict[str, Any]]] = [[] for _ in self._turns]
        async for row, delta in self._deltas():
            tokens[row] += self._entries(delta)
            if delta.whole is not None:
                turns[row] = delta.whole
        choices = [
            {
                "index": row,
                "message": {"refusal": None, **_with_reasoning(turn.message)},
                "logprobs": self._logprobs(tokens[row]),
                "finish_reason": turn.finish_reason,
            }
            for row, turn in sorted(turns.items())
        ]
        return {**self._head, "choices": choices, "usage": self._usage(turns)}

    def failure(self, error: ApiError) -> Iterable[object]:
        """The object that reports an error within a stream."""
        yield error.body()

    async def stream(self) -> AsyncGenerator[object, None]:
        """Yields the answer in pieces."""
        head = {**self._head, "object": "chat.completion.chunk"}
        without: dict[str, Any] = {"usage": None} if self._asked.stream.usage else {}
        turns: dict[int, ChatCompletion] = {}
        for row in range(len(self._turns)):
            yield {**head, "choices": [_choice(row, {"role": "assistant", "content": ""})], **without}
        async for row, delta in self._deltas():
            if delta.text or delta.reasoning:
                logprobs = self._logprobs(self._entries(delta))
                yield {**head, "choices": [_choice(row, _delta(delta), logprobs)], **without}
            if delta.calls:
                yield {**head, "choices": [_choice(row, {"tool_calls": list(map(_call, delta.calls))})], **without}
            if delta.whole is not None:
                turns[row] = delta.whole
                yield {**head, "choices": [_choice(row, {}, None, delta.whole.finish_reason)], **without}
        if self._asked.stream.usage:
            yield {**head, "choices": [], "usage": self._usage(turns)}

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        async for row, deltas in self._generation.results():
            for delta in joined(deltas):
                yield row, delta

    def _entries(self, delta: Delta) -> list[dict[str, Any]]:
        return [] if self._asked.logprobs is None else chat_logprobs(self._tokenizer, delta.answer_tokens)

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self._asked.logprobs is None else {"content": entries, "refusal": None}

    def _usage(self, turns: dict[int, ChatCompletion]) -> dict[str, Any]:
        return usage_json(
            [turn.completion.usage for turn in turns.values()],
            choices=self._asked.choices,
            cached=self._generation.cached_tokens(self._asked.choices),
            reasoning=sum(turn.reasoning_tokens for turn in self._turns),
        )


def _choice(
    row: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": row, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _delta(delta: Delta) -> dict[str, Any]:
    found = {"content": delta.text} if delta.text else {}
    # Clients read one or the other.
    return found | ({"reasoning": delta.reasoning, "reasoning_content": delta.reasoning} if delta.reasoning else {})


def _call(part: CallPart) -> dict[str, Any]:
    if not part.begins:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index, **ToolCall(part.id, part.name, part.arguments).to_json()}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {**message, "reasoning": reasoning}
