"""How well a model predicts a text."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from gptjax.checkpoints.hub import DEMOS
from gptjax.config import ModelConfig
from gptjax.engine import limits
from gptjax.errors import CheckpointError, RequestError
from gptjax.language_model import LanguageModel
from gptjax.support.files import read_bytes
from gptjax.support.quoting import quoted, shown

HELD_OUT: Final = DEMOS / "held-out.txt"  # 16 kB of books in the public domain, none of which the demos have read
_TEXT_BYTES: Final = 256 << 20
WINDOW: Final = 2048  # tokens, where none is asked for: attention over all 131,072 of GPT-OSS would take hours on a CPU
_NUMBERS: Final = 1 << 22  # logits looked at together in float64


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The exponential of the mean negative log-likelihood of a text's tokens, in float64 from the logits on."""

    value: float
    standard_error: float  # of `value`, as if the tokens' losses were independent
    num_tokens: int  # that were predicted

    @classmethod
    def of(cls, losses: np.ndarray) -> "Perplexity":
        """From the negative log-likelihood of each token."""
        value = float(np.exp(losses.mean()))
        return cls(value, value * float(losses.std()) / math.sqrt(len(losses)), len(losses))


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model makes of a text, for each token that it predicts."""

    losses: np.ndarray  # float64: negative log-likelihoods
    best: np.ndarray  # int: the most likely tokens


def perplexity(lm: LanguageModel, token_ids: Sequence[int], *, stride: int | None = None) -> Perplexity:
    """The perplexity of a text, in windows of `lm.max_length` tokens, each `stride` tokens after the one before.

    Arguments and errors are those of `predict`.
    """
    return Perplexity.of(predict(lm, token_ids, stride=stride).losses)


def predict(
    lm: LanguageModel,
    token_ids: Sequence[int],
    *,
    stride: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Predictions:
    """Predicts each token of a text once, teacher-forced, as Hugging Face's guide to perplexity has it.

    Args:
      stride: from one window of `lm.max_length` tokens to the next. A window predicts those tokens that the one before
        did not, so each but the first window's sees at least `lm.max_length - stride` tokens before it. Left out, it is
        `lm.max_length`: pieces that do not see each other, of each of which the first token is not predicted.
      advance: told of the tokens of each window, as they are done.

    Raises:
      RequestError: a stride that is none, fewer than two tokens, ids that are none, or logits that are not finite.
    """
    size = lm.max_length
    stride = check_stride(stride, size)
    found: list[Predictions] = []
    for start, end, first in windows(len(token_ids), size, stride):
        first = max(first, start + 1)  # nothing stands before a window's first token
        if first < end:
            logits_TV = lm.logits(token_ids[start:end])[first - start - 1 : -1]
            found.append(_judged(logits_TV, np.asarray(token_ids[first:end])))
        advance(end - start)
    if not found:
        raise RequestError(
            "a perplexity needs pieces of two tokens at least: give a longer text or a larger max_length"
        )
    return Predictions(*(np.concatenate([getattr(each, name) for each in found]) for name in ("losses", "best")))


def check_stride(stride: int | None, size: int) -> int:
    """A stride for windows of a size, as given or a whole window. Raises `RequestError` for what is none."""
    if stride is None:
        return size
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= size:
        raise RequestError(
            f"stride must be a whole number from 1 to the window of {size} tokens, found {quoted(stride)}"
        )
    return stride


def windows(length: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where each window over a text of so many tokens starts and ends, and the first token that none before it had."""
    first = 0
    for start in range(0, length, stride):
        end = min(start + size, length)
        yield start, end, first
        first = end
        if end == length:
            return


def window(config: ModelConfig, max_length: int | None) -> int:
    """The tokens of a window: as given, else $GPTJAX_MAX_LENGTH, else the model's positions, WINDOW at most.

    Raises:
      CapacityError, RequestError: as `gptjax.load`.
    """
    most = limits.positions(config, max_length)
    return most if max_length is not None or os.environ.get("GPTJAX_MAX_LENGTH") else min(most, WINDOW)


def read(path: str | Path) -> str:
    """The text of a file. Raises `RequestError` if it cannot be read, is not text, or is larger than 256 MiB."""
    try:
        data = read_bytes(Path(path), _TEXT_BYTES)
        if data is None:
            raise RequestError(f"{shown(path)} cannot be read (No such file or directory); name a text file")
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error}); convert it first, as with iconv") from None
    except CheckpointError as error:
        raise RequestError(str(error)) from None


def _judged(logits_TV: np.ndarray, targets_T: np.ndarray) -> Predictions:
    """Losses of the targets, and the most likely tokens, a few rows at a time: float64 of all would be large."""
    losses = np.empty(len(targets_T))
    rows = max(1, _NUMBERS // logits_TV.shape[-1])
    for start in range(0, len(targets_T), rows):
        some, targets = logits_TV[start : start + rows].astype(np.float64), targets_T[start : start + rows]
        if not np.isfinite(some).all():
            raise RequestError(
                "the model's logits were not finite (NaN or infinity), so nothing can be predicted: the weights may be "
                "damaged, or overflow in this dtype; try dtype='float32' (--dtype float32)"
            )
        some -= some.max(axis=-1, keepdims=True)
        log_sums = np.log(np.exp(some).sum(axis=-1))
        losses[start : start + rows] = log_sums - some[np.arange(len(targets)), targets]
    return Predictions(losses, logits_TV.argmax(axis=-1))
