"""Which web pages may use a server that has no key: any page can send requests to localhost, read or not."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Final

from gptjax.server.errors import ApiError

LOCAL_ORIGIN: Final = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
# Names that nobody can register, so that none can be made to lead here.
_PRIVATE: Final = (".localhost", ".local", ".internal")


class Pages:
    """Tells pages that may ask from those that may not."""

    def __init__(self, allowed: Sequence[str], *, local: bool) -> None:
        """`allowed` and `local` are `cors_origins` and `local` of `app.build`."""
        self._allowed = frozenset(allowed)
        self._names = {_name(origin.partition("://")[2]) for origin in allowed}
        self._local = local and "*" not in self._allowed

    def refusal(self, headers: Mapping[bytes, bytes]) -> ApiError | None:
        """The error that a request of a foreign page is answered; None for pages that may, and all that are none."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._local and not self._leads_here(_name(host)):
            # A page whose name was made to lead here is, to the browser, of one origin with this server.
            return _refused(f"this server is not {host[:100]!r}")
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = headers.get(b"sec-fetch-site") == b"same-origin" or origin.partition("://")[1:] == ("://", host)
        if not origin or own or re.fullmatch(LOCAL_ORIGIN, origin) or self._allowed & {"*", origin}:
            return None
        return _refused(f"web pages of {origin[:100]!r} may not use this server")

    def _leads_here(self, name: str) -> bool:
        return "." not in name or name.endswith(_PRIVATE) or name in self._names or is_address(name)


def _refused(what: str) -> ApiError:
    message = f"{what}; if that is meant, start it with --cors-origins or with --api-key"
    return ApiError(403, message, kind="permission_error", code="foreign_page")


def _name(host: str) -> str:
    """A host without its port, and an address of IPv6 without its brackets."""
    return re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()


def is_address(name: str, *, local: bool = False) -> bool:
    """Whether a host is an IP address; `local`, one that only this machine reaches."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or not local
