"""Limits on the texts of a prompt: one that is far too long is refused before all of it is encoded."""

from collections.abc import Callable, Iterable, Iterator

from gptjax.errors import CapacityError

# Characters. Longer texts are counted in blocks before they are encoded whole: ten million take 20 s and gigabytes.
_BLOCK = 1 << 16
# A block can have this many more tokens than the same characters inside the text, since it is cut at both ends.
_ENDS = 16
# Characters per token at most: prose has 4 to 5, and deeply indented code or schemas 12.
_PER_TOKEN = 16
_ALWAYS = 1 << 20  # characters that any prompt may have


class Bounds:
    """How long the texts of one prompt may be, in tokens and in characters."""

    def __init__(self, encode: Callable[[str], list[int]], max_length: int, *, shorten: str = "it") -> None:
        """`encode` gives a text's tokens; `shorten` is what an error asks the user to shorten."""
        self._encode = encode
        self._max_length = max_length
        self._shorten = shorten
        self._most = max(_ALWAYS, _PER_TOKEN * max_length)  # characters
        self._left = self._most

    def check(self, tokens: int) -> None:
        """Raises `CapacityError` if a prompt with this many tokens is too long."""
        if tokens > self._max_length:
            raise self._too_long(f"{self._max_length} tokens")

    def joined(self, pieces: Iterable[str], before: int = 0) -> str:
        """Joins the pieces of the next text; a string works too.

        Args:
          pieces: no more are taken once the prompt is certain not to fit.
          before: tokens already in the prompt.

        Raises:
          CapacityError: the prompt is certain to have more tokens than `max_length`, or its texts have more than 16
            characters for each of those, and more than a million.
        """
        blocks, tokens = [], before
        for block in self._blocks(pieces):
            if len(block) >= _BLOCK:
                tokens += len(self._encode(block)) - _ENDS
                self.check(tokens)
            blocks.append(block)
        return "".join(blocks)

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

    def _too_long(self, what: str) -> CapacityError:
        return CapacityError(
            f"the prompt has more than {what}, but max_length is {self._max_length}: shorten {self._shorten}, or load "
            "the model with a larger max_length if it has the positions"
        )
