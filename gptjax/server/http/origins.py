"""Which web pages may use a server without a key: any page can send requests to localhost, read or not."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Final

from gptjax.server.errors import ApiError

LOCAL_ORIGIN: Final = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
# Names that nobody can register, and so nobody can point here.
_PRIVATE: Final = (".localhost", ".local", ".internal")


class Pages:
    """Decides which web pages may use the server."""

    def __init__(self, allowed: Sequence[str], *, local: bool) -> None:
        """`allowed` and `local` are `cors_origins` and `local` of `app.build`."""
        self._allowed = frozenset(allowed)
        self._names = {_name(origin.partition("://")[2]) for origin in allowed}
        self._local = local and "*" not in self._allowed

    def refusal(self, headers: Mapping[bytes, bytes]) -> ApiError | None:
        """The error for a request from a foreign page; None for an allowed page, or if it comes from no page."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._local and not self._leads_here(_name(host)):
            # A page whose name was made to lead here has, to the browser, the same origin as this server.
            return _refused(f"this server is not {host[:100]!r}")
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = headers.get(b"sec-fetch-site") == b"same-origin" or origin.partition("://")[1:] == ("://", host)
        if not origin or own or re.fullmatch(LOCAL_ORIGIN, origin) or self._allowed & {"*", origin}:
            return None
        return _refused(f"web pages of {origin[:100]!r} may not use this server")

    def _leads_here(self, name: str) -> bool:
        return "." not in name or name.endswith(_PRIVATE) or name in self._names or is_address(name)


def _refused(what: str) -> ApiError:
    message = f"{what}; to allow it, start the server with --cors-origins or --api-key"
    return ApiError(403, message, kind="permission_error", code="foreign_page")


def _name(host: str) -> str:
    """A host without its port, and an IPv6 address without its brackets."""
    return re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()


def is_address(name: str, *, local: bool = False) -> bool:
    """Whether a host is an IP address; `local`, one that only this machine reaches."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or not local
