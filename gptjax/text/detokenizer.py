"""Turning a stream of token ids into text, one certain piece at a time."""

import codecs
from collections.abc import Callable


class Detokenizer:
    """Incremental decoder of one sequence of token ids; from `Tokenizer.stream`. Not for several threads at once.

    The pieces of all `push` calls and of `finish`, joined, are what `Tokenizer.decode` gives for the same ids. At most
    three bytes wait between calls, so the time is linear whatever the ids are.

    Attributes:
        ended: always False, as a text goes on for as long as there are tokens.
    """

    ended = False

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token: maybe none, never half a character.

        Raises:
            RequestError: the id is not an integer, or it is negative.
        """
        return self._decoder.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """The tail: U+FFFD where bytes wait for the rest of a character, else nothing. Then a new text may begin."""
        return self._decoder.decode(b"", final=True)
