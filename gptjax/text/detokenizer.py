"""Turns a stream of token ids into text, piece by piece, never splitting a character."""

import codecs
from collections.abc import Callable


class Detokenizer:
    """Incremental decoder of one sequence of token ids; made by `Tokenizer.stream`. Not thread-safe.

    The pieces of all `push` calls and of `finish`, joined, equal `Tokenizer.decode` of the same ids. At most three
    bytes wait between calls, so the time is linear whatever the ids.

    Attributes:
      ended: always False: a text continues as long as there are tokens.
    """

    ended = False

    def __init__(self, bytes_of: Callable[[int], bytes], *, strips_space: bool = False) -> None:
        """`bytes_of` gives a token's bytes; `strips_space` leaves out the space that the text begins with."""
        self._bytes_of = bytes_of
        self._strips_space = self._at_start = strips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Returns the text that this token completes: maybe none, never half a character.

        Raises:
          RequestError: the id is not an integer, or it is negative.
        """
        data = self._bytes_of(token_id)
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Returns the tail: U+FFFD if a character is incomplete, else nothing. A new text may begin afterwards."""
        self._at_start = self._strips_space
        return self._decoder.decode(b"", final=True)
