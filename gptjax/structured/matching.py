"""Which tokens may come next, for requests with a grammar."""

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final
from weakref import WeakSet

import numpy as np

from gptjax.errors import GptjaxError, RequestError
from gptjax.structured.grammar import Grammar
from gptjax.structured.library import library, limits
from gptjax.text import Tokenizer

MOST_AT_ONCE: Final = 8  # threads that look for the tokens of one grammar's requests
_QUICK: Final = 0.05  # seconds: what takes longer to compile is shared, whatever waits for it
_MOST_KEPT: Final = 512  # grammars that are compiled


def words_of(vocab_size: int) -> int:
    """How many words of 32 bits the allowed tokens of a row take: a bit for each token, and for the end of the text."""
    return vocab_size // 32 + 1


class Compiler:
    """Makes matchers for one tokenizer. Any number of threads may share one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: of the logits. What llguidance needs of the vocabulary is built when it is first needed."""
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Compiled] = OrderedDict()  # by source, and not used up; the last used at the end

    def prepare(self, grammar: Grammar) -> None:
        """Compiles a grammar, for `matcher` to find it. Raises `RequestError` if that fails."""
        compiled = self._found(grammar)
        with self._lock:
            wants_more = compiled.wants_more
            compiled.expected += 1
        if wants_more:  # without the lock: what another request needs may be wanted meanwhile
            made = self._compile(grammar)
            with self._lock:
                compiled.users[made] = WeakSet()

    def matcher(self, grammar: Grammar, end_ids: Sequence[int], drawn: Sequence[int] = ()) -> "Matcher":
        """What follows a text that must be of this grammar.

        Args:
          end_ids: the tokens that end it.
          drawn: tokens that it already has.
        """
        compiled = self._found(grammar)
        with self._lock:
            inner = min(compiled.users, key=lambda each: len(compiled.users[each]))
            made = Matcher(inner.deep_copy(), self.vocab_size, end_ids)
            compiled.users[inner].add(made)
            compiled.expected = max(0, compiled.expected - 1)
        for token_id in drawn:
            made.take(token_id)
        return made

    def _found(self, grammar: Grammar) -> "_Compiled":
        source = grammar.source
        with self._lock:
            found = self._kept.get(source)
        if found is None:
            began = time.perf_counter()
            made = self._compile(grammar)
            seconds = time.perf_counter() - began
        with self._lock:
            if found is None:
                found = self._kept.setdefault(source, _Compiled({made: WeakSet()}, seconds))
            self._kept[source] = found
            self._kept.move_to_end(source)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return found

    def _compile(self, grammar: Grammar) -> Any:
        with self._lock:
            vocabulary = self._vocabulary
        made = library().LLMatcher(vocabulary, grammar.source, log_level=0, limits=limits())
        if made.is_error():
            raise RequestError(f"the grammar cannot be compiled: {made.get_error()[:300]}")
        return made

    @cached_property
    def _vocabulary(self) -> Any:
        """llguidance's own view of the vocabulary. (It takes 2 seconds to build for 201,088 tokens.)"""
        library()
        return library().LLTokenizer(
            library().TokenizerWrapper(_Vocabulary(self._tokenizer, self.vocab_size)), n_vocab=self.vocab_size + 1
        )


def compiler_of(tokenizer: Tokenizer | GptjaxError, vocab_size: int) -> Compiler | None:
    """The compiler of a model; None without a tokenizer."""
    return None if isinstance(tokenizer, GptjaxError) else Compiler(tokenizer, vocab_size)


def prepare(compiler: Compiler | None, grammar: Grammar | None) -> None:
    """Compiles a request's grammar, if it has one, for the engine to find it. Takes up to a second.

    Raises:
      RequestError: the grammar does not compile, or the model has no tokenizer.
    """
    if grammar is None:
        return
    if compiler is None:
        raise RequestError("a grammar needs a tokenizer, and this model has none")
    compiler.prepare(grammar)


@dataclasses.dataclass
class _Compiled:
    """A grammar, compiled once for each of the threads that look for what its requests may draw, if that is quick.

    What is copied from one of llguidance's matchers shares a lexer with it, which has a lock.

    Attributes:
      users: llguidance's matchers, and what was copied from each and is still in use.
      seconds: that it took to compile.
      expected: requests that `Compiler.prepare` knows of, and `Compiler.matcher` not yet.
    """

    users: dict[Any, "WeakSet[Matcher]"]
    seconds: float
    expected: int = 0

    @property
    def wants_more(self) -> bool:
        """Whether another request would share a lexer, and need not."""
        count = len(self.users)
        may_be_more = self.seconds < _QUICK and count < MOST_AT_ONCE
        return may_be_more and self.expected + sum(map(len, self.users.values())) >= count


class _Vocabulary:
    """A vocabulary as llguidance reads it. The end of a text is a token of its own, after all others."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = vocab_size
        self.tokens = [*(tokenizer.token_bytes(token_id) for token_id in range(vocab_size)), b"<end>"]
        special = [number for number in tokenizer.special_ids.values() if number < vocab_size]
        self.special_token_ids = [*sorted(special), vocab_size]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text that a grammar leaves no choice about."""
        try:
            ids = self._tokenizer.encode(text.decode(), start=False)
        except (RequestError, UnicodeDecodeError):
            ids = []
        # Some tokenizers put a space before a text, and some lack letters.
        return ids if b"".join(self.tokens[token_id] for token_id in ids) == text else self._longest(text)

    def _longest(self, text: bytes) -> list[int]:
        """The longest token, and so on."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            ends = range(min(len(text), at + self._tokenizer.longest_token), at, -1)
            end = next((end for end in ends if text[at:end] in self._by_bytes), None)
            if end is None:
                break
            ids.append(self._by_bytes[text[at:end]])
            at = end
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        special = frozenset(self.special_token_ids)
        return {data: token_id for token_id, data in enumerate(self.tokens) if data and token_id not in special}


class Matcher:
    """One request's place in its grammar. Belongs to one thread at a time.

    Attributes:
      failure: why nothing can be said about the next token; None while that is not so.
    """

    def __init__(self, inner: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        self.inner = inner
        self.failure: str | None = None
        self._ended = False
        self._end = divmod(vocab_size, 32)
        self._ends = [token_id for token_id in end_ids if token_id < vocab_size]

    @property
    def is_over(self) -> bool:
        """Whether only the end may follow."""
        return self._ended or self.failure is not None

    def take(self, token_id: int) -> None:
        """Goes on after a token that was allowed."""
        if self.is_over:
            return
        if token_id in self._ends:
            self._ended = True
        elif not self.inner.consume_token(token_id):
            self._fail()

    def fill(self, words_W: np.ndarray) -> None:
        """Writes which tokens may come next, int32: bit t % 32 of word t // 32 is token t's."""
        if not self.is_over:
            self.inner.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)  # other threads run meanwhile
            if self.inner.is_error():
                self._fail()
        # The tokens that end the text stand for the end that llguidance knows.
        word, bit = self._end
        may_end = self.is_over or bool(int(words_W[word]) >> bit & 1)
        if self.is_over:
            words_W[:] = 0
        if may_end:
            bits = words_W.view(np.uint32)
            bits[word] &= ~np.uint32(1 << bit)
            for token_id in self._ends:
                bits[token_id // 32] |= np.uint32(1 << token_id % 32)

    def _fail(self) -> None:
        self.failure = str(self.inner.get_error())[:300] or "no token is allowed"
