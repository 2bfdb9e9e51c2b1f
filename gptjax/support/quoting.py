"""Makes untrusted strings and values safe for messages: short, and without terminal escapes."""

import reprlib
from collections.abc import Iterable
from typing import Final

_MOST: Final = 100  # characters of a value
_MOST_OF_NAMES: Final = 300
_CONTROLS: Final = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_CONTROLS.update({127: "\u2421"} | dict.fromkeys(range(128, 160), "\ufffd"))


class _Short(reprlib.Repr):
    """`repr` of the beginning of a value, however large it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _MOST
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 8
        self.maxlevel = 4

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 10_000:  # Python refuses to print more than 4,300 digits
            return f"a number of {x.bit_length()} bits"
        return super().repr_int(x, level)


_SHORT: Final = _Short()


def quoted(value: object) -> str:
    """A value's `repr`, with escapes, cut to about a hundred characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 2 * _MOST else f"{text[:_MOST]}...{text[-_MOST // 2 :]}"


def shown(name: object) -> str:
    """A name or path for printing: escaped if any of it is not printable, and cut to 300 characters."""
    text = str(name)
    text = text if text.isprintable() and text else ascii(text)
    return text if len(text) <= _MOST_OF_NAMES else f"{text[:_MOST_OF_NAMES]}…"


def names(texts: list[str], most: int = 10) -> str:
    """Comma-separated names: the first few, and the number of the rest."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(map(shown, texts[:most])) + more


def clean(text: str) -> str:
    """Text for a terminal: control characters other than tab and newline become visible symbols."""
    return text.translate(_CONTROLS)


def listed(faults: Iterable[str], indent: str = "  ", *, most: int = 20) -> str:
    """One fault per line, at most `most` of them, and how many more there are."""
    faults = list(faults)
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "\n".join(indent + fault for fault in faults[:most] + more)
