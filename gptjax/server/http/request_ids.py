"""An id for every request, in its answer's headers `x-request-id` and `request-id`, and in its log lines."""

import re
import secrets
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.server.logs import request_id

HEADER: Final = "x-request-id"
_ANTHROPIC: Final = b"request-id"  # where clients of its API look
_SANE: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Gives requests ids: the client's own, if it is short and plain, else a random one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER.encode(), b"")
        name = given if _SANE.fullmatch(given) else f"req_{secrets.token_hex(12)}".encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(header, name) for header in (HEADER.encode(), _ANTHROPIC)]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        token = request_id.set(name.decode())
        try:
            await self._app(scope, receive, named)
        finally:
            request_id.reset(token)
