"""Reasoning in an opaque form, which clients send back: `encrypted_content` of items, `signature` of thinking blocks.

It is not secret: the same answer has the plain text, unless the client did not want it. It exists for clients that keep
only this field.
"""

import base64
import binascii
import zlib
from typing import Final

from gptjax.server.errors import as_json, bad_request

_PREFIX: Final = "gptjax-1-"
_SUM: Final = 4  # bytes


def encrypted(text: str) -> str:
    """Reasoning as an opaque string."""
    data = text.encode()
    return _PREFIX + base64.urlsafe_b64encode(zlib.crc32(data).to_bytes(_SUM) + data).decode()


def decrypted(value: object, where: str) -> str:
    """The reasoning in `value`. Raises `ApiError` if this server did not write it, or if it was changed."""
    if isinstance(value, str) and value.startswith(_PREFIX):
        try:
            data = base64.b64decode(value.removeprefix(_PREFIX), altchars="-_", validate=True)
            if zlib.crc32(data[_SUM:]).to_bytes(_SUM) == data[:_SUM]:
                return data[_SUM:].decode()
        except (binascii.Error, ValueError):  # ValueError: characters that are not ASCII, or bytes that are not UTF-8
            pass
    raise bad_request(
        f"{where} ({as_json(value)}) is not what this server returned: send it unchanged, or leave the item out",
        "input",
    )


def verified(text: str, signature: object, where: str) -> str:
    """The reasoning of a thinking block: its text or, if that was omitted, what the signature holds.

    Raises `ApiError` if they do not fit together. Any signature that is not this server's fits any text.
    """
    if not isinstance(signature, str | None):
        raise bad_request(f"{where}.signature must be a string, found {as_json(signature)}")
    if not text:
        return decrypted(signature, f"{where}.signature") if signature else ""
    if signature and signature.startswith(_PREFIX) and signature != encrypted(text):
        raise bad_request(f"{where} was changed: its text is not what its signature holds; send it as it was returned")
    return text
