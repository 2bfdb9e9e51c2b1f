"""The header of a message: author, recipient, channel and content type.

A header is `ROLE[:NAME] [to=RECIPIENT][<|channel|>CHANNEL][ to=RECIPIENT][ CONTENT_TYPE]`. The recipient can be in
either place, and `<|constrain|>` can precede the content type. An author that is not a role is a tool.

Models also write malformed headers. Their recipient is found wherever it is:

    <|channel|>commentaryto=functions.f           glued to the word before it
    <|channel|>commentary To = "functions . f"    with spaces, capitals or quotes
    to=<|channel|>functions.f                     with a mark inside
    <|channel|>commentary functions.f             without `to=`, if it is `functions.NAME`
    <|channel|>commentary f json                  as a lone word, if a tool of that name was offered
    to=functions.f<|channel|><|channel|>final     before a mark that comes twice
"""

import re
from collections.abc import Set
from dataclasses import replace
from typing import Literal

from gptjax.text.fields import ROLES
from gptjax.text.harmony.messages import CHANNELS, FUNCTIONS, Message
from gptjax.text.harmony.special import CONSTRAIN

NOBODY = frozenset(("all", *ROLES, *CHANNELS))
"""Recipients that are not tools."""

# Represents a mark in a header's text. It ends words and names; `to=` and its name may be on different sides of it.
_MARK = "\0"
_GAP = r"[\s\0]*"
_WORD = r"[^\s\0{\"'`]+"  # of a name; models put arguments directly after it
# "to=functions.f", "to = functions . f", "TO='browser.search'", "to=<mark>functions.f"; the group is the name.
_RECIPIENT = re.compile(rf"{_GAP}to{_GAP}=[\s\0\"'`]*((?:{FUNCTIONS}{_GAP}\.{_GAP})?{_WORD})[\"'`]*", re.IGNORECASE)
# "functions.f" or "functions . f" as separate words.
_BARE_FUNCTION = re.compile(rf"(?<!\S){FUNCTIONS}\s*\.\s*{_WORD}", re.IGNORECASE)
# The part before a function's name, as in "Functions . f".
_NAMESPACE = re.compile(rf"{FUNCTIONS}{_GAP}\.{_GAP}", re.IGNORECASE)
# "json" directly before the text, as in `to=functions.f json{"x": 1}`; not the beginning of a longer word.
_CONTENT_TYPE = re.compile(r"\s*(json|code)(?![a-z])\s*", re.IGNORECASE)
# The gap before "functions.f", if only a content type or JSON follows that.
_GAP_BEFORE_FUNCTION = re.compile(rf"\s*(?={FUNCTIONS}\s*\.\s*{_WORD}\s*(?:json|code)?\s*(?:$|[{{\[]))", re.IGNORECASE)
# A header that ends with "to=functions.f" or "to=functions.f json".
_RECIPIENT_AT_END = re.compile(
    rf"to{_GAP}=[\s\0\"'`]*{FUNCTIONS}\.[^\s\0{{]+{_GAP}(?:json|code)?{_GAP}\Z", re.IGNORECASE
)
_PUNCTUATION = "?!,;:."  # that models put after names and channels


class Header:
    """Collects the text between the marks of one header.

    Attributes:
      explicit: whether `<|start|>` began it; otherwise the prompt did, and the author is the assistant.
      author: the text before other marks.
      channel: the text after `<|channel|>`; None before that.
      constrain: the text after `<|constrain|>`; None before that.
    """

    def __init__(self, *, explicit: bool, names: Set[str], before: "Header | None" = None) -> None:
        """`names`: of the offered tools. `before`: a header without a message text, which this one continues."""
        self.explicit = explicit
        self._names = names
        self.author = ""
        self.channel: str | None = None
        self.constrain: str | None = None
        self._last = "author"
        self._earlier_text = before._written() if before is not None else ""
        self._earlier = before.read() if before is not None and self._earlier_text else None

    @property
    def marked(self) -> bool:
        """Whether this is certainly a header, not text whose header is missing."""
        return self.explicit or self.channel is not None or self.constrain is not None

    @property
    def length(self) -> int:
        """Characters."""
        return len(self._written())

    def add(self, text: str) -> None:
        """Adds text to the latest part."""
        setattr(self, self._last, (getattr(self, self._last) or "") + text)

    def begin(self, part: Literal["channel", "constrain"]) -> None:
        """Begins a part after its mark; a part that occurs twice keeps its text."""
        self._last = part
        self.add("")

    def again(self) -> "Header":
        """The header that a second `<|channel|>` begins, with this one's author and, for now, its recipient."""
        header = Header(explicit=self.explicit, names=self._names, before=self)
        header.author = self.author
        return header

    def is_broken_off(self) -> bool:
        """Whether a mark that begins another header leaves this one without text; otherwise this is a message."""
        if self.channel is not None and _RECIPIENT_AT_END.search(self._written()):
            return True
        message, text = self.salvage()
        return not text or text == "to=" or (message.recipient is not None and text[0] not in "{[")

    def _written(self) -> str:
        """The text so far, with marks between the parts."""
        parts = (self._earlier_text, self.author, self.channel, self.constrain)
        return _MARK.join(part for part in parts if part)

    def read(self) -> Message:
        """The message, without its text yet. Words that have no place in a header are dropped."""
        recipients: list[str] = []
        written = _MARK.join([self._earlier_text, self.author, self.channel or "", self.constrain or ""])
        # The marks stay, so that the last three parts are this header's.
        left = _RECIPIENT.sub(lambda match: _take_recipient(match, recipients), written)
        *_, author, channel, constrain = left.split(_MARK)
        role, name, rest = self._read_author(author)
        if self.channel is None:  # its mark can be missing, too
            word, after = _first_word(rest)
            channel, rest = (word, after) if _known_channel(word) else ("", rest)
        channel, after = _first_word(channel)
        if not _known_channel(channel) and (channel in self._names or _BARE_FUNCTION.match(channel)):
            channel, after = "", f"{channel} {after}"
        rest += f" {after}"
        if NOBODY.issuperset(recipients) and (found := _BARE_FUNCTION.search(f"{rest} {constrain}")):
            recipients.append(_clean_name(found[0]))
            rest, constrain = _BARE_FUNCTION.sub("", rest), _BARE_FUNCTION.sub("", constrain)
        if NOBODY.issuperset(recipients) and (lone := self._lone_name(rest)):
            recipients.append(lone)
            rest = _without(rest, lone)
        tools = [name for name in recipients if name not in NOBODY]
        recipient = (tools or recipients)[-1] if recipients else None
        content_type = self._content_type(rest, constrain)
        channel_or_word = _known_channel(channel) or channel or None
        return self._completed(Message(role, "", name, channel_or_word, recipient, content_type))

    def _content_type(self, rest: str, constrain: str) -> str | None:
        """The word after `<|constrain|>`, or else the last word left in the header."""
        marked = self.constrain is not None
        words = [word for word in (constrain if marked else rest).split() if word != "to="]
        if not words:
            return None
        return CONSTRAIN + words[0] if marked else words[-1]

    def _lone_name(self, words: str) -> str | None:
        """The name of an offered tool, if it is the only word besides a content type."""
        alone = [word for word in words.split() if not _CONTENT_TYPE.fullmatch(word)]
        return alone[0] if len(alone) == 1 and alone[0] in self._names else None

    def _completed(self, message: Message) -> Message:
        """The message, completed from the previous header."""
        before = self._earlier
        if before is None or before.role != "assistant" or message.role != "assistant":
            return message
        return replace(
            message,
            channel=message.channel or before.channel,
            recipient=message.recipient or before.recipient,
            content_type=message.content_type or before.content_type,
        )

    def salvage(self) -> tuple[Message, str]:
        """The message and its text, possibly "", if no `<|message|>` comes: anything that cannot be header is text."""
        role, name, rest = self._read_author(self.author)
        if role == "tool" and not (_RECIPIENT.match(rest) or _BARE_FUNCTION.match(name or "")):
            role, name, rest = "assistant", None, self.author
        channel, after = _first_word(self.channel or "")
        if _known_channel(channel) is None:
            channel, after = "", self.channel or ""
        rest += after
        if self.channel is not None and (lone := self._lone_name(rest)):
            rest = f"to={lone} {_without(rest, lone)}"
        elif self.channel is not None and (gap := _GAP_BEFORE_FUNCTION.match(rest)):
            rest = f"to={rest[gap.end() :]}"
        recipient = _RECIPIENT.match(rest)
        text = rest[recipient.end() if recipient else 0 :] + (self.constrain or "")
        kind = _CONTENT_TYPE.match(text) if recipient or self.constrain is not None else None
        content_type = (CONSTRAIN if self.constrain is not None else "") + (kind[1] if kind else "")
        message = Message(
            role,
            "",
            name,
            _known_channel(channel),
            _clean_name(recipient[1]) if recipient else None,
            content_type if kind else None,
        )
        return self._completed(message), text[kind.end() if kind else 0 :].lstrip()

    def _read_author(self, author: str) -> tuple[str, str | None, str]:
        """Role, name, and the rest."""
        word, rest = _first_word(author)
        if not self.explicit:
            return "assistant", None, rest if word.lower() == "assistant" else author
        if word.lower().startswith("assistant") and _known_channel(glued := word[len("assistant") :]):
            return "assistant", None, f" {glued}{rest}"
        role, _, name = word.partition(":")
        if role.lower() in ROLES and role != "tool":
            return role.lower(), name or None, rest
        if not word or _RECIPIENT.match(word):
            return "assistant", None, author
        return "tool", word, rest


def _take_recipient(match: re.Match[str], recipients: list[str]) -> str:
    """Replaces a recipient with the marks inside it, and collects its name. A word that cannot be a name stays."""
    marks = _MARK * match[0].count(_MARK)
    name = _clean_name(match[1])
    if _CONTENT_TYPE.fullmatch(name) or (marks and name in CHANNELS):
        return f"{marks} {name} "
    recipients += [name] if name else []
    return f"{marks} "


def _clean_name(recipient: str) -> str:
    """A recipient without punctuation, and without gaps or capitals in its `functions.`."""
    name = recipient.strip(_PUNCTUATION) if recipient.lower() != f"{FUNCTIONS}." else recipient
    return _NAMESPACE.sub(f"{FUNCTIONS}.", name, count=1) if _NAMESPACE.match(name) else name


def _known_channel(channel: str) -> str | None:
    """The channel that a word means, or None."""
    plain = channel.lower().strip(_PUNCTUATION)
    return plain if plain in CHANNELS else None


def _without(words: str, taken: str) -> str:
    return " ".join(word for word in words.split() if word != taken)


def _first_word(text: str) -> tuple[str, str]:
    """The first word, "" if there is none, and the rest."""
    words = text.lstrip()
    word = words.split(maxsplit=1)[0] if words else ""
    return word, words[len(word) :]
