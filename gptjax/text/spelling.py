"""How a vocabulary writes its tokens, and the bytes that they are."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

SPACE: Final = "▁"  # SentencePiece's space
_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way of writing tokens."""

    kind: str
    token_bytes: Callable[[str], bytes]
    """The bytes of a token of the vocabulary."""
    added_bytes: Callable[[str], bytes]
    """The bytes of an added token, by its content."""
    byte_tokens: tuple[str, ...]
    """The token of each byte from 0 to 255."""

    def missing(self, tokens: Collection[str]) -> frozenset[int]:
        """The bytes that have no token."""
        return frozenset(byte for byte, token in enumerate(self.byte_tokens) if token not in tokens)


def _alphabet() -> tuple[str, ...]:
    """GPT-2's letters for bytes (openai/gpt-2 `bytes_to_unicode`): printable ones as themselves, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256))


_ALPHABET: Final = _alphabet()
_BYTE_OF: Final = {letter: byte for byte, letter in enumerate(_ALPHABET)}


def _unspell(token: str) -> bytes:
    """A byte for each letter. A token that is not in the alphabet is plain text, as in HF's decoder."""
    try:
        return bytes([_BYTE_OF[letter] for letter in token])
    except KeyError:
        return token.encode()


def _piece(token: str) -> bytes:
    """One byte for "<0xE2>"; any other token is text, with "▁" for a space."""
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace(SPACE, " ").encode()


BYTE_LEVEL: Final = Spelling("byte-level-bpe", _unspell, str.encode, _ALPHABET)
SENTENCEPIECE: Final = Spelling("sentencepiece-bpe", _piece, _piece, tuple(f"<0x{byte:02X}>" for byte in range(256)))
