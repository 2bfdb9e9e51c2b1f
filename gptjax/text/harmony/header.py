"""What stands before a message's text: author, recipient, channel and content type.

A header is `ROLE[:NAME] [to=RECIPIENT][<|channel|>CHANNEL][ to=RECIPIENT][ CONTENT_TYPE]`, where the recipient may
stand in either place and `<|constrain|>` may go before the content type. An author who has none of the roles is a tool.
"""

import re

from gptjax.text.harmony.messages import CHANNELS, ROLES, Message
from gptjax.text.harmony.special import CONSTRAIN

_RECIPIENT = re.compile(r"\s*(?<!\S)to=(\S+)")


class Header:
    """Collects the text between the marks of one header.

    Attributes:
        explicit: whether `<|start|>` began it; otherwise the prompt did, and the author is the assistant.
        channel: what follows `<|channel|>`; None before that.
        constrain: what follows `<|constrain|>`; None before that.
    """

    def __init__(self, *, explicit: bool) -> None:
        self.explicit = explicit
        self.author = ""
        self.channel: str | None = None
        self.constrain: str | None = None

    @property
    def marked(self) -> bool:
        """Whether it is a header for sure, and not text whose header is missing."""
        return self.explicit or self.channel is not None or self.constrain is not None

    @property
    def length(self) -> int:
        """Characters."""
        return len(self.author) + len(self.channel or "") + len(self.constrain or "")

    def add(self, text: str) -> None:
        """Text goes to the last part begun."""
        if self.constrain is not None:
            self.constrain += text
        elif self.channel is not None:
            self.channel += text
        else:
            self.author += text

    def read(self) -> Message:
        """A message without text yet. Words that are no header's are dropped."""
        role, name, rest = self._read_author()
        channel, after = _first_word(self.channel or "")
        rest += after
        recipient = _RECIPIENT.search(rest)
        if self.constrain is not None:
            content_type = CONSTRAIN + _first_word(self.constrain)[0]
        else:
            words = _RECIPIENT.sub("", rest).split()
            content_type = words[-1] if words else ""
        return Message(role, "", name, channel or None, recipient and recipient[1], content_type or None)

    def salvage(self) -> tuple[Message, str]:
        """The message and its text, maybe none, where no `<|message|>` came: what is no part of a header is text."""
        role, name, rest = self._read_author()
        if role == "tool":
            role, name, rest = "assistant", None, self.author
        channel, after = _first_word(self.channel or "")
        if channel not in CHANNELS:
            channel, after = "", self.channel or ""
        rest += after
        recipient = _RECIPIENT.match(rest)
        text = rest[recipient.end() if recipient else 0 :] + (self.constrain or "")
        return Message(role, "", name, channel or None), text.lstrip()

    def _read_author(self) -> tuple[str, str | None, str]:
        """Role, name, and what follows."""
        word, rest = _first_word(self.author)
        if not self.explicit:
            return "assistant", None, rest if word == "assistant" else self.author
        role, _, name = word.partition(":")
        if role in ROLES and role != "tool":
            return role, name or None, rest
        if not word or word.startswith("to="):
            return "assistant", None, self.author
        return "tool", word, rest


def _first_word(text: str) -> tuple[str, str]:
    """The first word, maybe empty, and what follows it."""
    words = text.lstrip()
    word = words.split(maxsplit=1)[0] if words else ""
    return word, words[len(word) :]
