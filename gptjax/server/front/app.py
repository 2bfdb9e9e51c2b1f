"""The HTTP application: its routes, errors and middleware."""

import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.errors import GptjaxError
from gptjax.server.anthropic import errors as anthropic_errors
from gptjax.server.anthropic import messages
from gptjax.server.errors import ApiError, internal, of_gptjax
from gptjax.server.front import health, page
from gptjax.server.generation.service import Service
from gptjax.server.http.origins import LOCAL_ORIGIN, Pages
from gptjax.server.http.request_ids import HEADER, RequestIds
from gptjax.server.http.sse import ClientGone, error_response
from gptjax.server.openai import chat_completions, completions, models
from gptjax.server.openai.responses import responses, stored_responses
from gptjax.server.openai.responses.tools import WARNING

_log = logging.getLogger(__name__)


def build(
    service: Service, *, api_key: str | None = None, cors_origins: Sequence[str] = (), local: bool = False
) -> Starlette:
    """The application.

    Args:
      api_key: the key that requests under /v1/ must carry; None admits all but those of foreign web pages.
      cors_origins: origins whose web pages may use the server, "*" for all; this machine's always may.
      local: the server listens on this machine only, so no public DNS name leads to it.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    # Not Starlette's BaseHTTPMiddleware, which hides that a client has left.
    middleware = [
        Middleware(RequestIds),
        Middleware(Counting, service=service),
        Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_origin_regex=LOCAL_ORIGIN,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[HEADER, WARNING],
        ),
        Middleware(Faults),
        Middleware(Gate, api_key=api_key, pages=Pages(cors_origins, local=local)),
    ]
    routes = [
        *page.routes(),
        Route("/health", health.health),
        Route("/metrics", health.metrics),
        Route("/v1/models", models.models),
        Route("/v1/models/{name:path}", models.model),
        Route("/v1/completions", completions.respond, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions.respond, methods=["POST"]),
        Route("/v1/responses", responses.respond, methods=["POST"]),
        Route("/v1/responses/{response_id}", stored_responses.respond, methods=["GET", "DELETE"]),
        Route("/v1/responses/{response_id}/input_items", stored_responses.input_items),
        Route(anthropic_errors.ROUTES, messages.respond, methods=["POST"]),
        Route(f"{anthropic_errors.ROUTES}/count_tokens", messages.count_tokens, methods=["POST"]),
    ]
    handlers = dict.fromkeys((ApiError, GptjaxError, HTTPException, ClientGone), _on_error)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect would go to whatever Host the client sent
    app.state.service = service
    return app


class Gate:
    """Checks the API key or, if there is none, keeps foreign web pages out.

    Also answers OPTIONS, which browsers and some clients send before anything else.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, pages: Pages) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await Response(status_code=204, headers={"Allow": "GET, HEAD, POST, DELETE, OPTIONS"})(scope, receive, send)
        elif scope["path"].startswith("/v1/") and (error := self._refusal(scope)) is not None:
            await _as_response(error, scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._key is None:
            return self._pages.refusal(headers)
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [headers.get(b"x-api-key", b"")] + ([token] if scheme.lower() == b"bearer" else [])
        # In constant time, so that nobody can guess the key letter by letter.
        if any(hmac.compare_digest(each.strip(), self._key) for each in given):
            return None
        return ApiError(
            401,
            "the API key is missing or wrong: send it in the header Authorization, as 'Bearer KEY', or in x-api-key",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class Faults:
    """Answers unexpected failures. Starlette would do so outside the middleware that adds CORS headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            response = await _on_error(Request(scope, receive), error)
            if begun:
                raise
            await response(scope, receive, send)


class Counting:
    """Counts answers by route and status, and times them."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = time.monotonic()

        def count(status: int) -> None:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"
            self._metrics.answered(path, status, time.monotonic() - read)

        async def reading() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read = time.monotonic()
            return message

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        await self._app(scope, reading, watched)


async def _on_error(request: Request, error: Exception) -> Response:
    """The answer to any exception."""
    match error:
        case ClientGone():
            return Response(status_code=499)  # nobody reads it
        case ApiError():
            found = error
        case GptjaxError():
            found = of_gptjax(error)
        case HTTPException():
            # Not `request.url`: it contains the Host header, which may be anything.
            message = f"{request.method[:20]} {request.scope['path'][:200]}: {error.detail}"
            found = ApiError(error.status_code, message, code="no_such_route", headers=error.headers)
        case _:
            _log.error("%s %r failed", request.method, request.scope["path"][:200], exc_info=error)
            found = internal()
    request.app.state.service.metrics.failed(found)
    return _as_response(found, request.scope["path"])


def _as_response(error: ApiError, path: str) -> Response:
    """An error as the API that was asked has it."""
    return anthropic_errors.error_response(error) if anthropic_errors.is_ours(path) else error_response(error)
