"""Errors in the form that clients of OpenAI's API read: `{"error": {message, type, param, code}}`."""

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from gptjax.errors import CapacityError, GptjaxError
from gptjax.server.ipc.events import Failed, QueueFull, Unavailable
from gptjax.support.quoting import quoted

# Fields of a request; the first one in a message of the library's is its `param`.
_FIELD = re.compile(
    r"\b(?:response_format|tool_choice|guided_json|guided_regex|guided_choice|guided_grammar|structured_outputs|messages|tools|prompt|reasoning_effort|enable_thinking|logit_bias|repetition_penalty|stop|seed|max_tokens|top_k|top_logprobs)\b"
)
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients heed this
_RETRY_SECONDS = "5"
_UNAVAILABLE = ("drained", "stopped", "died", "out_of_memory")
_LONGEST_MESSAGE: Final = 1000  # characters
_LONGEST_NAME: Final = 100


class ApiError(Exception):
    """The answer to a client instead of a result."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_shortened(message))
        self.status = status
        self.kind = kind
        self.param = None if param is None else param[:_LONGEST_NAME]
        self.code = code
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which would leave out all but the message."""
        made = partial(ApiError, kind=self.kind, param=self.param, code=self.code, headers=self.headers)
        return made, (self.status, str(self))

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, or of an event in a stream."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def as_json(value: object) -> str:
    """A JSON value as an error message quotes it: short, however large the value is."""
    if isinstance(value, list | dict):
        return kind_of(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else quoted(value)


def kind_of(value: object) -> str:
    """The kind of JSON that a value is, with its article."""
    kinds = {list: "a list", dict: "an object", str: "a string", bool: "true or false", int: "a number"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _shortened(message: str) -> str:
    """A message without its middle, if it is long: the beginning names the place, the end the fix."""
    if len(message) <= _LONGEST_MESSAGE:
        return message
    half = _LONGEST_MESSAGE // 2
    return f"{message[:half]} [...] {message[-half:]}"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is invalid, however often it is sent."""
    return ApiError(400, message, param=param, code=code)


def of_gptjax(error: GptjaxError, param: str | None = None) -> ApiError:
    """400 for the library's errors about a request; 429 or 503 if it cannot be run now."""
    if isinstance(error, QueueFull):
        return _of_full_queue(error)
    if isinstance(error, Unavailable):
        return unavailable(str(error), "unavailable")
    if param is None and (field := _FIELD.search(str(error))):
        param = field.group()
    code = "context_length_exceeded" if isinstance(error, CapacityError) else None
    return bad_request(str(error), param, code)


def _of_full_queue(error: QueueFull) -> ApiError:
    """429, with the seconds to wait."""
    headers = {"Retry-After": str(error.retry_after)}
    return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)


def of_failure(failed: Failed) -> ApiError:
    """400 for a faulty grammar, 503 where a retry may succeed, and otherwise 500, which tells clients not to retry."""
    if failed.kind == "grammar":
        return bad_request(failed.message, code=failed.kind)
    if failed.kind in _UNAVAILABLE:
        return unavailable(failed.message, failed.kind)
    return ApiError(500, failed.message, kind="server_error", code=failed.kind, headers=NO_RETRY)


def unavailable(message: str, code: str) -> ApiError:
    """503: not now."""
    headers = {"Retry-After": _RETRY_SECONDS}
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def internal() -> ApiError:
    """500 for a fault of ours; the log has the details."""
    message = "internal server error; see the server's log"
    return ApiError(500, message, kind="server_error", code="internal", headers=NO_RETRY)
