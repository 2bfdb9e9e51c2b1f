"""Text to token ids and back, for byte-level and SentencePiece BPE tokenizers."""

import operator
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.detokenizer import Detokenizer
from gptjax.text.encoder import Encoders
from gptjax.text.reading import read_vocabulary
from gptjax.text.settings import read_settings
from gptjax.text.template import read_chat_template
from gptjax.text.vocabulary import Vocabulary


class Tokenizer:
    """A BPE; made by `load_tokenizer` or `tokenizer_from_gguf`. Immutable, so any number of threads may share one.

    Attributes:
      bos_id: the token before a text, or None.
      eos_ids: the tokens that generation stops at; empty if unknown.
      vocab_size: one past the largest id. The model's logits may be wider.
      context_length: the most positions the model's config allows, or None if no file says.
      kind: "byte-level-bpe", or "sentencepiece-bpe" if unknown characters fall back to tokens for bytes.
      special_ids: id of each special token, by its content.
      longest_token: bytes of the longest token.
      chat_template: the checkpoint's own chat template, or None if it has none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        context_length: int | None,
        chat_template: str | None = None,
    ) -> None:
        self.kind = vocabulary.spelling.kind
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.context_length = context_length
        self.chat_template = chat_template
        self.special_ids: Mapping[str, int] = MappingProxyType({t.content: t.id for t in vocabulary.added if t.special})
        self._special = frozenset(self.special_ids.values())
        spelling = vocabulary.spelling
        self._bytes = {number: spelling.token_bytes(token) for token, number in vocabulary.ids.items()}
        self._bytes |= {token.id: spelling.added_bytes(token.content) for token in vocabulary.added}
        self._strips_space = vocabulary.strips_space
        self.vocab_size = max(self._bytes) + 1
        self.longest_token = max(map(len, self._bytes.values()))
        self._unknown = spelling.missing(vocabulary.ids)
        self._encoders = Encoders(vocabulary)

    def __repr__(self) -> str:
        return (
            f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_ids={self.eos_ids})"
        )

    def encode(self, text: str, *, special: bool = False, start: bool = True) -> list[int]:
        """The ids of `text`; none are added before or after it.

        Args:
          text: any string without lone surrogates.
          special: whether special tokens written in the text, like "<|endoftext|>", become those tokens. Otherwise
            they are plain text like any other: keep it that way for text that a user wrote.
          start: whether a prompt begins with the text; False for what follows a special token. Some SentencePiece
            tokenizers put a space before the first text only.

        Raises:
          RequestError: not a string, a lone surrogate, or a byte that the vocabulary has no token for.
        """
        self._check(text)
        return self._encoders.encode(text, special=special, start=start)

    def prompt(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`, with those that tokenizer.json's post_processor adds around it, usually a BOS.

        The same as transformers' `tokenizer(text)`, except that tokens already there are not added again. Most
        tokenizers of GPT-2 and GPT-OSS add nothing. Arguments and errors are those of `encode`.
        """
        ids = self.encode(text, special=special)
        before, after = self._encoders.before, self._encoders.after
        if before and ids[: len(before)] == before:
            before = []
        if after and ids[-len(after) :] == after:
            after = []
        return [*before, *ids, *after]

    def decode(self, ids: Iterable[SupportsIndex], *, special: bool = False, start: bool = True) -> str:
        """The text of `ids`. Invalid bytes become U+FFFD, and unknown ids are skipped.

        Args:
          ids: integers of any kind (NumPy's too), not negative.
          special: whether special tokens are written out; otherwise they are left out.
          start: whether a text begins here; False if the ids continue one. Most SentencePiece tokenizers put a space
            before a text, and it is left out at the start.

        Raises:
          RequestError: not a sequence of integers, or a negative one.
        """
        if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Iterable):
            raise RequestError(f"decode takes a sequence of token ids, not {type(ids).__name__}: encode returns one")
        data = b"".join([self._shown(token_id, special) for token_id in ids])
        if start and self._strips_space:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def stream(self, *, special: bool = False, start: bool = True) -> Detokenizer:
        """A decoder that takes ids one by one and returns, piece by piece, the same text as `decode`."""
        return Detokenizer(partial(self._shown, special=special), strips_space=start and self._strips_space)

    def token_bytes(self, token_id: SupportsIndex) -> bytes:
        """The bytes of one token (a special token's content as UTF-8), b"" for an unknown id.

        Raises:
          RequestError: not an integer, or negative.
        """
        return self._bytes.get(_checked_id(token_id), b"")

    def _shown(self, token_id: SupportsIndex, special: bool) -> bytes:
        number = _checked_id(token_id)
        return b"" if number in self._special and not special else self._bytes.get(number, b"")

    def _check(self, text: str) -> None:
        if not isinstance(text, str):
            raise RequestError(f"the text is {type(text).__name__}, not str: decode bytes first, join lists")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}, which is "
                "not a character: read it with errors='replace', or join pairs by .encode('utf-16', 'surrogatepass')"
            ) from error
        unknown = self._unknown and self._unknown.intersection(data)
        if unknown:
            raise RequestError(f"the vocabulary has no token for the bytes {bytes(sorted(unknown))!r} of the text")


def load_tokenizer(
    directory: str | os.PathLike[str], *, generation_config: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint's directory.

    Reads tokenizer.json, else vocab.json and merges.txt; then the tokens added later, from tokenizer_config.json, or
    added_tokens.json and special_tokens_map.json; and for the first and last tokens (in this order)
    generation_config.json, config.json, special_tokens_map.json and tokenizer_config.json. The chat template is that of
    chat_template.jinja, else of tokenizer_config.json.

    Args:
      generation_config: replaces generation_config.json.

    Raises:
      CheckpointError: files are missing or damaged.
      ConfigError: the tokenizer is of another kind than these two, or a first or last token is not in the vocabulary.
    """
    settings = read_settings(Path(directory), generation_config)
    model_type = settings.model.get("model_type")
    vocabulary = read_vocabulary(settings.directory, settings.tokenizer, settings.special, model_type)
    known = vocabulary.ids | {token.content: token.id for token in vocabulary.added}
    bos, eos = settings.ends("bos", known), settings.ends("eos", known)
    return Tokenizer(
        vocabulary,
        bos_id=bos[0] if bos else None,
        eos_ids=eos,
        context_length=settings.context_length,
        chat_template=read_chat_template(settings.directory, settings.tokenizer),
    )


def _checked_id(token_id: SupportsIndex) -> int:
    if type(token_id) is int and token_id >= 0:
        return token_id
    try:
        number = operator.index(token_id)
    except TypeError:
        number = None
    if number is None or isinstance(token_id, bool):
        raise RequestError(f"a token id is an integer, not {quoted(token_id)} ({type(token_id).__name__})")
    if number < 0:
        raise RequestError(f"a token id is at least 0, found {quoted(number)}: drop padding before decoding")
    return number
