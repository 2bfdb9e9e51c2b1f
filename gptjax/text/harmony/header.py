"""What stands before a message's text: author, recipient, channel and content type.

A header is `ROLE[:NAME] [to=RECIPIENT][<|channel|>CHANNEL][ to=RECIPIENT][ CONTENT_TYPE]`, where the recipient may
stand in either place and `<|constrain|>` may go before the content type. An author who has none of the roles is a tool.

Models do not always write it so. A recipient is found wherever it is in a header: glued to what is before it, apart
from its `to=`, in capitals or quotes, before a mark that comes twice, or without `to=` if it is `functions.NAME` or a
lone word that names a tool.
"""

import re
from collections.abc import Set
from dataclasses import replace
from typing import Literal

from gptjax.text.harmony.messages import CHANNELS, FUNCTIONS, ROLES, Message
from gptjax.text.harmony.special import CONSTRAIN

NOBODY = frozenset(("all", *ROLES, *CHANNELS))
"""Recipients that are not tools."""

# Stands for a mark within a header; neither words nor recipients go on across it, but `to=` and its value may.
_MARK = "\0"
_NAME = rf"(?:{FUNCTIONS}[\s\0]*\.[\s\0]*)?[^\s\0{{\"'`]+"
_TO = re.compile(rf"[\s\0]*to[\s\0]*=[\s\0\"'`]*({_NAME})[\"'`]*", re.IGNORECASE)
_WITHOUT_TO = re.compile(rf"(?<!\S){FUNCTIONS}\s*\.\s*[^\s\0{{\"'`]+", re.IGNORECASE)
_PREFIX = re.compile(rf"{FUNCTIONS}[\s\0]*\.[\s\0]*", re.IGNORECASE)
_CONTENT_TYPE = re.compile(r"\s*(json|code)(?![a-z])\s*", re.IGNORECASE)
_WITHOUT_TO_AND_ALONE = re.compile(
    rf"\s*(?={FUNCTIONS}\s*\.\s*[^\s\0{{\"'`]+\s*(?:json|code)?\s*(?:$|[{{\[]))", re.IGNORECASE
)
_TO_AT_END = re.compile(rf"to[\s\0]*=[\s\0\"'`]*{FUNCTIONS}\.[^\s\0{{]+[\s\0]*(?:json|code)?[\s\0]*\Z", re.IGNORECASE)
_AROUND = "?!,;:."


class Header:
    """Collects the text between the marks of one header.

    Attributes:
        explicit: whether `<|start|>` began it; otherwise the prompt did, and the author is the assistant.
        author: what precedes other marks.
        channel: what follows `<|channel|>`; None before that.
        constrain: what follows `<|constrain|>`; None before that.
    """

    def __init__(self, *, explicit: bool, names: Set[str], before: "Header | None" = None) -> None:
        """`names` are those of tools; `before` is a header without a text that this one goes on from."""
        self.explicit = explicit
        self._names = names
        self.author = ""
        self.channel: str | None = None
        self.constrain: str | None = None
        self._last = "author"
        self._said = before._written() if before is not None else ""
        self._meant = before.read() if before is not None and self._said else None

    @property
    def marked(self) -> bool:
        """Whether it is a header for sure, and not text whose header is missing."""
        return self.explicit or self.channel is not None or self.constrain is not None

    @property
    def length(self) -> int:
        """Characters."""
        return len(self._written())

    def add(self, text: str) -> None:
        """Text goes to the last part begun."""
        setattr(self, self._last, (getattr(self, self._last) or "") + text)

    def begin(self, part: Literal["channel", "constrain"]) -> None:
        """A mark. What follows is of this part, after what was said of it before."""
        self._last = part
        self.add("")

    def again(self) -> "Header":
        """The header that a second `<|channel|>` begins: by the same author, and with the same recipient so far."""
        header = Header(explicit=self.explicit, names=self._names, before=self)
        header.author = self.author
        return header

    def is_broken_off(self) -> bool:
        """Whether another mark that begins a header leaves no text of this one; otherwise that is a message."""
        if self.channel is not None and _TO_AT_END.search(self._written()):
            return True
        message, text = self.salvage()
        return not text or text == "to=" or (message.recipient is not None and text[0] not in "{[")

    def _written(self) -> str:
        """What was said of it so far, with marks between."""
        parts = (self._said, self.author, self.channel, self.constrain)
        return _MARK.join(part for part in parts if part)

    def read(self) -> Message:
        """A message without text yet. Words that are no header's are dropped."""
        recipients: list[str] = []
        written = _MARK.join([self._said, self.author, self.channel or "", self.constrain or ""])
        *_, author, channel, constrain = _TO.sub(lambda match: _taken(match, recipients), written).split(_MARK)
        role, name, rest = self._read_author(author)
        if self.channel is None:  # its mark may be missing, too
            channel, rest = _first_word(rest) if _known(_first_word(rest)[0]) else ("", rest)
        channel, after = _first_word(channel)
        if not _known(channel) and (channel in self._names or _WITHOUT_TO.match(channel)):
            channel, after = "", f"{channel} {after}"
        rest += f" {after}"
        if NOBODY.issuperset(recipients) and (found := _WITHOUT_TO.search(f"{rest} {constrain}")):
            recipients.append(_plain(found[0]))
            rest, constrain = _WITHOUT_TO.sub("", rest), _WITHOUT_TO.sub("", constrain)
        if NOBODY.issuperset(recipients) and (lone := self._lone_name(rest)):
            recipients.append(lone)
            rest = " ".join(word for word in rest.split() if word != lone)
        words = [word for word in (rest if self.constrain is None else constrain).split() if word != "to="]
        content_type = (words[-1] if self.constrain is None else CONSTRAIN + words[0]) if words else None
        # Of several, the last one that can be a tool's.
        recipient = max(reversed(recipients), key=lambda name: name not in NOBODY, default=None)
        return self._completed(Message(role, "", name, _known(channel) or channel or None, recipient, content_type))

    def _lone_name(self, words: str) -> str | None:
        """A tool's name that stands alone, but for a content type."""
        alone = [word for word in words.split() if not _CONTENT_TYPE.fullmatch(word)]
        return alone[0] if len(alone) == 1 and alone[0] in self._names else None

    def _completed(self, message: Message) -> Message:
        before = self._meant
        if before is None or before.role != "assistant" or message.role != "assistant":
            return message
        return replace(
            message,
            channel=message.channel or before.channel,
            recipient=message.recipient or before.recipient,
            content_type=message.content_type or before.content_type,
        )

    def salvage(self) -> tuple[Message, str]:
        """The message and its text, maybe none, where no `<|message|>` came: what is no part of a header is text."""
        role, name, rest = self._read_author(self.author)
        if role == "tool" and not (_TO.match(rest) or _WITHOUT_TO.match(name or "")):
            role, name, rest = "assistant", None, self.author
        channel, after = _first_word(self.channel or "")
        if _known(channel) is None:
            channel, after = "", self.channel or ""
        rest += after
        if self.channel is not None and (lone := self._lone_name(rest)):
            rest = " ".join([f"to={lone}", *(word for word in rest.split() if word != lone)])
        elif self.channel is not None:
            rest = _WITHOUT_TO_AND_ALONE.sub("to=", rest, count=1) if _WITHOUT_TO_AND_ALONE.match(rest) else rest
        recipient = _TO.match(rest)
        text = rest[recipient.end() if recipient else 0 :] + (self.constrain or "")
        kind = _CONTENT_TYPE.match(text) if recipient or self.constrain is not None else None
        content_type = (CONSTRAIN if self.constrain is not None else "") + (kind[1] if kind else "")
        message = Message(
            role,
            "",
            name,
            _known(channel),
            _plain(recipient[1]) if recipient else None,
            content_type if kind else None,
        )
        return self._completed(message), text[kind.end() if kind else 0 :].lstrip()

    def _read_author(self, author: str) -> tuple[str, str | None, str]:
        """Role, name, and what follows."""
        word, rest = _first_word(author)
        if not self.explicit:
            return "assistant", None, rest if word.lower() == "assistant" else author
        if word.lower().startswith("assistant") and _known(glued := word[len("assistant") :]):
            return "assistant", None, f" {glued}{rest}"
        role, _, name = word.partition(":")
        if role.lower() in ROLES and role != "tool":
            return role.lower(), name or None, rest
        if not word or _TO.match(word):
            return "assistant", None, author
        return "tool", word, rest


def _taken(match: re.Match[str], recipients: list[str]) -> str:
    """Takes a recipient out of a header; the marks inside stay. What cannot be one stays, too."""
    marks = _MARK * match[0].count(_MARK)
    name = _plain(match[1])
    if _CONTENT_TYPE.fullmatch(name) or (marks and name in CHANNELS):
        return f"{marks} {name} "
    recipients += [name] if name else []
    return f"{marks} "


def _plain(recipient: str) -> str:
    """Without what is not part of the name."""
    name = recipient.strip(_AROUND) if recipient.lower() != f"{FUNCTIONS}." else recipient
    return _PREFIX.sub(f"{FUNCTIONS}.", name, count=1) if _PREFIX.match(name) else name


def _known(channel: str) -> str | None:
    """The channel that is meant; None for another word."""
    plain = channel.lower().strip(_AROUND)
    return plain if plain in CHANNELS else None


def _first_word(text: str) -> tuple[str, str]:
    """The first word, maybe empty, and what follows it."""
    words = text.lstrip()
    word = words.split(maxsplit=1)[0] if words else ""
    return word, words[len(word) :]
