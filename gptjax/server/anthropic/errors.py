"""Errors as clients of Anthropic's API read them: `{"type": "error", "error": {type, message}, "request_id"}`."""

from typing import Any, Final

from starlette.responses import Response

from gptjax.server.errors import ApiError, bad_request
from gptjax.server.http.sse import json_response
from gptjax.server.logs import request_id

ROUTES: Final = "/v1/messages"
_KINDS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def is_ours(path: str) -> bool:
    """Whether what is asked for at this path is answered in Anthropic's form."""
    return path == ROUTES or path.startswith(f"{ROUTES}/")


def body(error: ApiError) -> dict[str, Any]:
    """The JSON of the answer, or of an event in a stream."""
    described = {"type": _KINDS.get(error.status, "invalid_request_error"), "message": str(error)}
    return {"type": "error", "error": described, "request_id": request_id.get()}


def error_response(error: ApiError) -> Response:
    """An error as an answer."""
    return json_response(body(error), error.status, error.headers)


def too_long(tokens: int, most: int, *, at_least: bool = False) -> ApiError:
    """400 for a prompt that does not fit, in Anthropic's words: Claude Code finds the numbers, and compacts."""
    known = "at least " if at_least else ""
    return bad_request(
        f"prompt is too long: {known}{tokens} tokens > {most} maximum", "messages", "context_length_exceeded"
    )
