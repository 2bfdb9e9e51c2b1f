"""`POST /v1/completions`: continues text or token ids."""

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from gptjax.engine.options import make_request
from gptjax.engine.output import Chunk, Usage
from gptjax.engine.request import MAX_TOP_LOGPROBS, check_prompt
from gptjax.errors import GptjaxError
from gptjax.server.errors import ApiError, bad_request, of_gptjax
from gptjax.server.generation.answering import answered
from gptjax.server.generation.generation import Generation, Row
from gptjax.server.generation.served import Served
from gptjax.server.generation.service import Service
from gptjax.server.generation.shared_fields import (
    MOST_CHOICES,
    MOST_TOKENS,
    WITHOUT_EFFECT,
    Stream,
    are_tokens,
    read_guided,
    read_sampling,
    read_stream,
    seed_of_choice,
)
from gptjax.server.http.fields import Fields, check_text
from gptjax.server.openai.logprobs import LegacyLogprobs, joined
from gptjax.server.openai.usage import usage_json
from gptjax.structured.wishes import GUIDED

_DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's
_MOST_ECHOED: Final = 32 << 20  # characters of prompts, and of their log-probabilities, in one answer
_FEW_IDS: Final = 10_000  # checked in half a millisecond
_NO_PROMPT: Final = "a prompt must be a string or a list of token ids (whole numbers of at least 0)"
_ENTRY: Final = 40  # characters of a token and its log-probability, roughly


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a request."""

    ids: tuple[int, ...]
    text: str  # for `echo` to repeat; "" for token ids that are not echoed


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, checked as far as it can be without the model's limits."""

    prompts: tuple[Prompt, ...]
    choices: int  # of each prompt
    max_tokens: int  # 0 only with `echo`: then nothing is generated
    options: dict[str, Any]
    echo: bool
    logprobs: int | None  # alternatives for each token; None: no log-probabilities
    stream: Stream

    def rows(self, served: Served) -> list[Row[Chunk]]:
        """A row for each choice of each prompt, grouped by prompt. Raises `ApiError`."""
        if not self.max_tokens:
            return []
        options = self.options | {"max_tokens": self.max_tokens, "top_logprobs": self.logprobs or 0}
        try:
            return [
                Row(
                    make_request(prompt.ids, seed_of_choice(options, choice), served.defaults, served.eos_ids),
                    served.tokenizer.stream(start=False) if served.tokenizer is not None else None,
                    _as_it_is,
                )
                for prompt in self.prompts
                for choice in range(self.choices)
            ]
        except GptjaxError as error:
            raise of_gptjax(error) from None


def read(values: dict[str, Any], served: Served, most_rows: int) -> Asked:
    """Reads a request's fields. Raises `ApiError` for the first invalid one."""
    fields = Fields(values)
    served.check_name(fields.text("model"))
    choices = fields.whole("n", 1, MOST_CHOICES) or 1
    if (best_of := fields.whole("best_of", 1, MOST_CHOICES)) is not None and best_of != choices:
        raise bad_request(
            f"best_of is {best_of} and n is {choices}; gptjax supports only best_of equal to n", "best_of"
        )
    if fields.text("suffix"):
        raise bad_request("suffix is not supported: the models only continue texts", "suffix")
    echo = fields.flag("echo")
    max_tokens = fields.whole("max_tokens", 0, MOST_TOKENS)
    if max_tokens == 0 and not echo:
        raise bad_request("max_tokens is 0, which requires echo: true", "max_tokens")
    special = "parse_special" not in fields or fields.flag("parse_special")
    if any(name in fields for name in GUIDED) and served.tokenizer is None:
        message = f"the model {served.name!r} has no tokenizer, which the form of a text needs"
        raise bad_request(message, code="unsupported")
    asked = Asked(
        prompts=_read_prompts(fields.take("prompt"), served, most_rows // choices, special=special, echo=echo),
        choices=choices,
        max_tokens=_DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        options=_with_special_stops(read_sampling(fields) | {"grammar": read_guided(fields)}, served, special),
        echo=echo,
        logprobs=fields.whole("logprobs", 0, MAX_TOP_LOGPROBS),
        stream=read_stream(fields),
    )
    fields.finish(WITHOUT_EFFECT)
    _check_echo(asked)
    return asked


def _with_special_stops(options: dict[str, Any], served: Served, special: bool) -> dict[str, Any]:
    """The options, with stop strings that are special tokens also in `stop_ids`: these never appear as text."""
    if not special or served.tokenizer is None or "stop" not in options:
        return options
    known = served.tokenizer.special_ids
    found = [known[stop] for stop in options["stop"] if stop in known]
    return options | {"stop_ids": [*options.get("stop_ids", ()), *found]}


def _check_echo(asked: Asked) -> None:
    """Raises `ApiError` if echoing the prompts, times `n` and with log-probabilities, would make a huge answer."""
    if not asked.echo:
        return
    characters = sum(len(prompt.text) for prompt in asked.prompts)
    if asked.logprobs is not None:
        characters += sum(len(prompt.ids) for prompt in asked.prompts) * (1 + asked.logprobs) * _ENTRY
    if characters * asked.choices > _MOST_ECHOED:
        message = f"the echo would have about {characters * asked.choices >> 20} MiB, more than {_MOST_ECHOED >> 20}"
        raise bad_request(f"{message}: send fewer prompts at once, or lower n or logprobs", "echo", "too_large")


def _read_prompts(value: object, served: Served, most: int, *, special: bool, echo: bool) -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    if value is None:
        raise bad_request("prompt is missing: give a string, a list of token ids, or a list of either", "prompt")
    if isinstance(value, list) and len(value) > max(most, served.max_length):  # checking millions takes seconds
        message = f"prompt has {len(value)} items: at most {most} prompts are allowed with this n, and max_length is "
        raise bad_request(f"{message}{served.max_length} tokens", "prompt", "context_length_exceeded")
    one = isinstance(value, str) or (isinstance(value, list) and bool(value) and type(value[0]) is int)
    prompts = [value] if one else value
    if not isinstance(prompts, list) or not prompts:
        raise bad_request("prompt must be a string, a list of token ids, or a non-empty list of either", "prompt")
    if len(prompts) > most:
        raise bad_request(f"found {len(prompts)} prompts; at most {most} are allowed with this n", "prompt")
    return tuple(_read_prompt(prompt, served, special=special, echo=echo) for prompt in prompts)


def _read_prompt(value: object, served: Served, *, special: bool, echo: bool) -> Prompt:
    if isinstance(value, str):
        text = check_text(value, "prompt")
        try:
            ids = served.encode(text, special=special)
        except GptjaxError as error:
            raise of_gptjax(error, "prompt") from None
        return Prompt(_checked_ids(ids, served), text)
    if not isinstance(value, list):
        raise bad_request(_NO_PROMPT, "prompt")
    checked = _checked_ids(value, served)
    return Prompt(checked, served.tokenizer.decode(checked, special=True) if echo and served.tokenizer else "")


def _checked_ids(ids: list[Any], served: Served) -> tuple[int, ...]:
    try:
        return check_prompt(ids, vocab_size=served.vocab_size, max_length=served.max_length)
    except GptjaxError as error:
        raise of_gptjax(error, "prompt") if are_tokens(ids) else bad_request(_NO_PROMPT, "prompt") from None


async def respond(request: Request) -> Response:
    """Answers a request."""

    def read_with_limits(values: dict[str, Any], service: Service) -> Asked:
        return read(values, service.served, service.limits.rows)

    return await answered(request, read_with_limits, Answer, is_quick=_is_quick)


def _is_quick(values: dict[str, Any]) -> bool:
    """Whether a request is quick to read: a prompt of at most a few thousand token ids, without echo or a grammar."""
    prompt = values.get("prompt")
    ids = isinstance(prompt, list) and 0 < len(prompt) <= _FEW_IDS and type(prompt[0]) is int
    return ids and not values.get("echo") and not any(name in values for name in GUIDED)


class Answer:
    """The answer to a request."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._service = service
        self._asked = asked
        self.streams = asked.stream.wanted
        self._generation = Generation(service, asked.rows(service.served))
        self._tokenizer = service.served.tokenizer
        count = len(asked.prompts) * asked.choices
        self._logprobs = [LegacyLogprobs(self._tokenizer, asked.logprobs or 0) for _ in range(count)]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.served.name,
        }

    def start(self) -> None:
        """Submits the prompts. Raises `ApiError` and `QueueFull`."""
        if self._asked.echo and self._asked.logprobs is not None:
            self._service.enter_scoring(self)
        try:
            self._generation.start()
        except ApiError:
            self.close()
            raise

    def close(self) -> None:
        """Cancels whatever is still running."""
        self._service.leave_scoring(self)
        self._generation.close()

    async def whole(self) -> dict[str, Any]:
        """Returns the answer in one piece."""
        parts: list[list[dict[str, Any]]] = [[] for _ in self._logprobs]
        usages: dict[int, Usage] = {}
        async for choice in self._choices(usages):
            parts[choice["index"]].append(choice)
        choices = [_whole(index, of_choice) for index, of_choice in enumerate(parts)]
        return {**self._head, "choices": choices, "usage": self._usage(usages)}

    def failure(self, error: ApiError) -> Iterable[object]:
        """The object that reports an error within a stream."""
        yield error.body()

    async def stream(self) -> AsyncGenerator[object, None]:
        """Yields the answer in pieces."""
        usages: dict[int, Usage] = {}
        without: dict[str, Any] = {"usage": None} if self._asked.stream.usage else {}
        async for choice in self._choices(usages):
            yield {**self._head, "choices": [choice], **without}
        if self._asked.stream.usage:
            yield {**self._head, "choices": [], "usage": self._usage(usages)}

    async def _choices(self, usages: dict[int, Usage]) -> AsyncGenerator[dict[str, Any], None]:
        """Yields choices, a piece at a time, and fills `usages` on the way."""
        if self._asked.echo:
            for number, prompt in enumerate(self._asked.prompts):
                async for piece in self._echo(number, prompt):
                    yield piece
        async for row, chunks in self._generation.results():
            if (completion := chunks[-1].completion) is not None:
                usages[row] = completion.usage
            piece = self._piece(row, chunks)
            if piece["text"] or piece["finish_reason"] is not None or piece["logprobs"] is not None:
                yield piece

    async def _echo(self, number: int, prompt: Prompt) -> AsyncGenerator[dict[str, Any], None]:
        scores = None
        if self._asked.logprobs is not None:
            try:
                scores = await self._service.score(prompt.ids, self._asked.logprobs)
            except GptjaxError as error:
                raise of_gptjax(error) from None
        for choice in range(self._asked.choices):
            index = number * self._asked.choices + choice
            logprobs = None if scores is None else self._logprobs[index].of_prompt(prompt.ids, scores)
            ended = None if self._asked.max_tokens else "length"
            yield {"index": index, "text": prompt.text, "logprobs": logprobs, "finish_reason": ended}

    def _piece(self, row: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs is not None:
            tokens = [(chunk.token_id, chunk.text, chunk.logprob, chunk.top_logprobs) for chunk in chunks]
            logprobs = self._logprobs[row].of_tokens(tokens)
        text = "".join([chunk.text for chunk in chunks])
        return {"index": row, "text": text, "logprobs": logprobs, "finish_reason": chunks[-1].finish_reason}

    def _usage(self, usages: dict[int, Usage]) -> dict[str, Any]:
        if usages:
            rows = [usages[row] for row in range(len(usages))]
        else:  # nothing was generated
            rows = [Usage(len(prompt.ids), 0) for prompt in self._asked.prompts for _ in range(self._asked.choices)]
        return usage_json(rows, choices=self._asked.choices, cached=self._generation.cached_tokens(self._asked.choices))


def _as_it_is(chunk: Chunk) -> Chunk:
    return chunk


def _whole(index: int, parts: list[dict[str, Any]]) -> dict[str, Any]:
    logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    return {
        "index": index,
        "text": "".join(part["text"] for part in parts),
        "logprobs": joined(logprobs) if logprobs else None,
        "finish_reason": parts[-1]["finish_reason"],
    }
