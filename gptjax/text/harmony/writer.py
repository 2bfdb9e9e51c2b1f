"""Collects the token ids of a prompt, and refuses one that no context holds before all of it was made."""

from collections.abc import Iterable, Iterator

from gptjax.errors import CapacityError
from gptjax.text.harmony.special import special_ids
from gptjax.text.tokenizer import Tokenizer

LONGEST = 131_072
"""Positions of GPT-OSS's context."""

# Characters. Texts are counted in blocks of this size before they are encoded as a whole.
_BLOCK = 1 << 16
# A block's ends can have this many more tokens than the same characters inside the text.
_ENDS = 16
# Characters that are made into a prompt at most: text has 4 to 5 a token, and deeply indented schemas 12.
_PER_TOKEN = 16
_ALWAYS = 1 << 20


class Writer:
    """Marks become special tokens, texts never do.

    What it costs depends on `max_length`, not on what was asked for: the pieces of a text are no longer taken once it
    is certain that the prompt does not fit.

    Attributes:
        ids: the prompt so far.

    Raises:
        RequestError: the tokenizer lacks harmony's special tokens.
        CapacityError: from `mark` and `text`, where the prompt has more than `max_length` tokens, or its texts more
            than 16 characters for each of them, and more than a million.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int = LONGEST) -> None:
        self.ids: list[int] = []
        self._special = special_ids(tokenizer)
        self._encode = tokenizer.encode
        self._max_length = max_length
        self._most = max(_ALWAYS, _PER_TOKEN * max_length)  # characters
        self._left = self._most

    def mark(self, token: str) -> None:
        """A special token."""
        self.ids.append(self._special[token])
        self._check(len(self.ids))

    def text(self, pieces: Iterable[str]) -> None:
        """A text in pieces; a string will do. What is next to each other becomes tokens together."""
        blocks, tokens = [], len(self.ids)
        for block in self._blocks(pieces):
            if len(block) >= _BLOCK:
                tokens += len(self._encode(block)) - _ENDS
                self._check(tokens)
            blocks.append(block)
        self.ids += self._encode("".join(blocks))
        self._check(len(self.ids))

    def _blocks(self, pieces: Iterable[str]) -> Iterator[str]:
        pending: list[str] = []
        size = 0
        for piece in [pieces] if isinstance(pieces, str) else pieces:
            self._left -= len(piece)
            if self._left < 0:
                raise self._too_long(f"{self._most} characters")
            for start in range(0, len(piece), _BLOCK):
                pending.append(piece[start : start + _BLOCK])
                size += len(pending[-1])
                if size >= _BLOCK:
                    yield "".join(pending)
                    pending, size = [], 0
        yield "".join(pending)

    def _check(self, tokens: int) -> None:
        if tokens > self._max_length:
            raise self._too_long(f"{self._max_length} tokens")

    def _too_long(self, what: str) -> CapacityError:
        return CapacityError(
            f"the prompt has more than {what}, but max_length is {self._max_length}: shorten "
            "messages or tools, or load the model with a larger max_length if it has the positions"
        )
