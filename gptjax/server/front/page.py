"""`GET /`: a chat page, and the files that it loads."""

from functools import cache, partial
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES: Final = {
    "page.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "page_article.js": "text/javascript",
    "page_asking.js": "text/javascript",
    "page_store.js": "text/javascript",
}
# Scripts, styles and requests of this server's only. No script may make markup of text: the browser throws instead.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The page is at /, its files are beside it. They need no API key; the page's requests do."""
    return [Route("/" if name == "page.html" else f"/{name}", partial(_respond, name)) for name in FILES]


@cache
def _content(name: str) -> bytes:
    return (resources.files("gptjax.server.front") / "static" / name).read_bytes()


async def _respond(name: str, _: Request) -> Response:
    return Response(_content(name), media_type=FILES[name], headers=_HEADERS)
