"""Collects the token ids of a prompt, within a context's bounds."""

from collections.abc import Iterable

from gptjax.text.bounded import Bounds
from gptjax.text.tokenizer import Tokenizer

LONGEST = 131_072
"""Positions of the longest contexts, GPT-OSS's and Llama 3.1's."""


class Writer:
    """Collects marks, which become special tokens, and texts, which never do.

    The cost depends on `max_length`, not on the request: once the prompt is certain not to fit, no more pieces of a
    text are taken.

    Attributes:
      ids: the prompt so far.

    Raises:
      CapacityError: from `mark` and `text`, if the prompt has more than `max_length` tokens, or its texts too many
        characters (see `Bounds`).
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int = LONGEST) -> None:
        self.ids: list[int] = []
        self._special = tokenizer.special_ids
        self._encode = tokenizer.encode
        self._bounds = Bounds(tokenizer.encode, max_length, shorten="messages or tools")

    def mark(self, token: str) -> None:
        """Adds a special token, which the tokenizer has."""
        self.ids.append(self._special[token])
        self._bounds.check(len(self.ids))

    def text(self, pieces: Iterable[str]) -> None:
        """Adds a text in pieces, which are encoded as one; a string works too."""
        self.ids += self._encode(self._bounds.joined(pieces, len(self.ids)), start=not self.ids)
        self._bounds.check(len(self.ids))
