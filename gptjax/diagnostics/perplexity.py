"""How well a model predicts a text."""

import dataclasses
import math
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

HELD_OUT: Final = DEMOS / "held-out.txt"  # 16 kB of public-domain books that the demos were not trained on
_TEXT_BYTES: Final = 256 << 20
WINDOW: Final = 2048  # default in tokens: attention over all of GPT-OSS's 131,072 would take hours on a CPU
_NUMBERS: Final = 1 << 22  # logits processed at a time in float64


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The exponential of the mean negative log-likelihood of a text's tokens, computed in float64 from the logits."""

    value: float
    standard_error: float  # of `value`, as if the tokens' losses were independent
    num_tokens: int  # predicted

    @classmethod
    def of(cls, losses: np.ndarray) -> "Perplexity":
        """From the negative log-likelihood of each token."""
        value = float(np.exp(losses.mean()))
        return cls(value, value * float(losses.std()) / math.sqrt(len(losses)), len(losses))


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's predictions for a text, one for each predicted token."""

    losses: np.ndarray  # float64: negative log-likelihoods
    best: np.ndarray  # int: the most likely tokens


def perplexity(lm: LanguageModel, token_ids: Sequence[int], *, stride: int | None = None) -> Perplexity:
    """The perplexity of a text, in windows of `lm.max_length` tokens, `stride` tokens apart.

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
    """Predicts each token of a text once, teacher-forced, as in Hugging Face's guide to perplexity.

    Args:
      stride: from one window of `lm.max_length` tokens to the next. A window predicts the tokens that earlier windows
        did not, so outside the first window each token has at least `lm.max_length - stride` tokens of context. The
        default is `lm.max_length`: independent pieces, the first token of which is not predicted.
      advance: called after each window with its number of tokens.

    Raises:
      RequestError: an invalid stride, fewer than two tokens, invalid ids, or logits that are not finite.
    """
    size = lm.max_length
    stride = check_stride(stride, size)
    found: list[Predictions] = []
    for start, end, first in windows(len(token_ids), size, stride):
        first = max(first, start + 1)  # a window's first token has no context
        if first < end:
            logits_TV = lm.logits(token_ids[start:end])[first - start - 1 : -1]
            found.append(_judged(logits_TV, np.asarray(token_ids[first:end])))
        advance(end - start)
    if not found:
        raise RequestError("perplexity needs pieces of at least two tokens: give a longer text or a larger max_length")
    return Predictions(*(np.concatenate([getattr(each, name) for each in found]) for name in ("losses", "best")))


def check_stride(stride: int | None, size: int) -> int:
    """The given stride, checked, or the window size if it is None. Raises `RequestError` if it is invalid."""
    if stride is None:
        return size
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= size:
        raise RequestError(
            f"stride must be a whole number from 1 to the window of {size} tokens, found {quoted(stride)}"
        )
    return stride


def windows(length: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields start and end of each window over `length` tokens, and the first token that no earlier window had."""
    first = 0
    for start in range(0, length, stride):
        end = min(start + size, length)
        yield start, end, first
        first = end
        if end == length:
            return


def window(config: ModelConfig, max_length: int | None) -> int:
    """The window size in tokens: as given, else $GPTJAX_MAX_LENGTH, else the model's positions, at most WINDOW.

    Raises:
      CapacityError, RequestError: as for `gptjax.load`.
    """
    return limits.positions(config, max_length, default=WINDOW)


def read(path: str | Path) -> str:
    """A file's text. Raises `RequestError` if it cannot be read, is not UTF-8, or is larger than 256 MiB."""
    try:
        data = read_bytes(Path(path), _TEXT_BYTES)
        if data is None:
            raise RequestError(f"{shown(path)} cannot be read (No such file or directory); name a text file")
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error}); convert it first, for example with iconv") from None
    except CheckpointError as error:
        raise RequestError(str(error)) from None


def _judged(logits_TV: np.ndarray, targets_T: np.ndarray) -> Predictions:
    """Losses of the targets, and the most likely tokens, a few rows at a time to bound the float64 copies."""
    losses = np.empty(len(targets_T))
    rows = max(1, _NUMBERS // logits_TV.shape[-1])
    for start in range(0, len(targets_T), rows):
        some, targets = logits_TV[start : start + rows].astype(np.float64), targets_T[start : start + rows]
        if not np.isfinite(some).all():
            raise RequestError(
                "the model's logits were not finite (NaN or infinity), so nothing can be predicted: the weights may be "
                "damaged, or values may overflow in this dtype; try dtype='float32' (--dtype float32)"
            )
        some -= some.max(axis=-1, keepdims=True)
        log_sums = np.log(np.exp(some).sum(axis=-1))
        losses[start : start + rows] = log_sums - some[np.arange(len(targets)), targets]
    return Predictions(losses, logits_TV.argmax(axis=-1))
