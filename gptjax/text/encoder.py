"""Text to ids with the `tokenizers` library, without the truncation, padding and dropout that it would add."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tokenizers
from tokenizers import models

from gptjax.errors import CheckpointError, ConfigError, RequestError
from gptjax.support.quoting import shown
from gptjax.text.spelling import SENTENCEPIECE
from gptjax.text.vocabulary import AddedToken, Vocabulary


class Encoder:
    """Encodes text with a vocabulary's model and some of its added tokens; it reads the others as plain text.

    The library numbers added tokens itself, right after the model's tokens, whatever the files say. So it gets numbers
    without gaps, which are mapped to the real ids afterwards.
    """

    def __init__(self, vocabulary: Vocabulary, model: models.BPE, added: Sequence[AddedToken]) -> None:
        self._file = vocabulary.file
        self._ids = sorted(vocabulary.ids.values())
        self._engine = _engine(vocabulary, model)
        self._engine.add_tokens([_of_library(token) for token in added])
        for token in added:
            number = self._engine.token_to_id(token.content)
            if number is not None and number >= len(self._ids):  # else the model has the token
                self._ids.append(token.id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        # The batch call lets other threads run. Without offsets it takes half the time.
        try:
            (encoding,) = self._engine.encode_batch_fast([text], add_special_tokens=False)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise RequestError(
                f"{self._file} cannot cut this text into words ({shown(error)}): give token ids, or another text"
            ) from None
        return [self._ids[number] for number in encoding.ids]


class Encoders:
    """A vocabulary's encoders, which share its model.

    Attributes:
      before, after: ids that the post-processor puts around a text.

    Raises:
      CheckpointError: the library cannot make them.
      ConfigError: the post-processor does anything else.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        ordered = sorted(vocabulary.ids, key=vocabulary.ids.__getitem__)
        numbers = {token: number for number, token in enumerate(ordered)}
        falls_back = vocabulary.spelling is SENTENCEPIECE
        plain, special = [each for each in vocabulary.added if not each.special], vocabulary.added + vocabulary.ordinary
        try:
            model = models.BPE(
                numbers, vocabulary.merges, ignore_merges=vocabulary.ignore_merges, byte_fallback=falls_back
            )
            first = Encoder(vocabulary, model, plain), Encoder(vocabulary, model, special)
            later = first
            if (inner := _not_first(vocabulary)) is not None:
                later = Encoder(inner, model, plain), Encoder(inner, model, special)
            self.before, self.after = _around(vocabulary, model)
        except ConfigError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):  # the library raises no narrower type
                raise
            raise CheckpointError(f"{vocabulary.file} is damaged: {shown(error)}; download it again") from error
        self._encoders = {True: first, False: later}

    def encode(self, text: str, *, special: bool, start: bool) -> list[int]:
        """The ids of a text.

        Args:
          special: whether special tokens in it become those tokens; otherwise they are plain text.
          start: whether a prompt begins with it.
        """
        return self._encoders[start][special].encode(text)


def _not_first(vocabulary: Vocabulary) -> Vocabulary | None:
    """The same vocabulary for texts that do not begin a prompt, if it puts a space before the first text only."""
    cut = vocabulary.pre_tokenizer
    if not isinstance(cut, dict) or cut.get("prepend_scheme") != "first":
        return None
    return replace(vocabulary, pre_tokenizer={**cut, "prepend_scheme": "never"})


def _around(vocabulary: Vocabulary, model: models.BPE) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text, tried with a sample."""
    if vocabulary.post_processor is None:
        return [], []
    sample = next((token for token in vocabulary.ids if len(token) == 1 and token.isascii() and token.isalnum()), "")
    plain = _engine(vocabulary, model).encode(sample, add_special_tokens=False).ids
    encoding = _engine(vocabulary, model, vocabulary.post_processor).encode(sample, add_special_tokens=True)
    ids, added = encoding.ids, encoding.special_tokens_mask
    start = added.index(0) if 0 in added else len(ids)
    end = start + len(plain)
    if added != [1] * start + [0] * len(plain) + [1] * (len(ids) - end):
        raise ConfigError(
            f"{vocabulary.file} has a post_processor that repeats, leaves out or divides the text, which gptjax does "
            "not support: remove the post_processor from the file, or give token ids instead of text"
        )
    return ids[:start], ids[end:]


def _engine(vocabulary: Vocabulary, model: models.BPE, post_processor: Any = None) -> tokenizers.Tokenizer:
    frame: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": vocabulary.normalizer,
        "pre_tokenizer": vocabulary.pre_tokenizer,
        "post_processor": post_processor,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    engine = tokenizers.Tokenizer.from_str(json.dumps(frame))
    engine.model = model
    return engine


def _is_panic(error: BaseException) -> bool:
    """Whether the library gave up, as its regular expressions do after ten million steps. It is not an `Exception`."""
    return type(error).__name__ == "PanicException"


def _of_library(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )
