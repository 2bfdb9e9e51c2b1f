"""Collects the token ids of a prompt, within the bounds of a context."""

from collections.abc import Iterable

from gptjax.text.bounded import Bounds
from gptjax.text.harmony.special import special_ids
from gptjax.text.tokenizer import Tokenizer

LONGEST = 131_072
"""Positions of GPT-OSS's context."""


class Writer:
    """Marks become special tokens, texts never do.

    The cost depends on `max_length`, not on the request: once the prompt is certain not to fit, no more pieces of a
    text are taken.

    Attributes:
        ids: the prompt so far.

    Raises:
        RequestError: the tokenizer lacks harmony's special tokens.
        CapacityError: from `mark` and `text`, if the prompt has more than `max_length` tokens, or its texts too many
            characters (see `Bounds`).
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int = LONGEST) -> None:
        self.ids: list[int] = []
        self._special = special_ids(tokenizer)
        self._encode = tokenizer.encode
        self._bounds = Bounds(tokenizer.encode, max_length, shorten="messages or tools")

    def mark(self, token: str) -> None:
        """A special token."""
        self.ids.append(self._special[token])
        self._bounds.check(len(self.ids))

    def text(self, pieces: Iterable[str]) -> None:
        """A text in pieces, which are encoded as one; a string will do."""
        self.ids += self._encode(self._bounds.joined(pieces, len(self.ids)))
        self._bounds.check(len(self.ids))
