"""How well a model predicts a text."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gptjax.errors import RequestError
from gptjax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The exponential of the mean negative log-likelihood of a text's tokens, in float64 from the logits on."""

    value: float
    standard_error: float  # of `value`, as if the tokens' losses were independent
    num_tokens: int  # that were predicted


def perplexity(lm: LanguageModel, token_ids: Sequence[int]) -> Perplexity:
    """The perplexity of a text, cut into pieces of `lm.max_length` tokens that do not see each other.

    The first token of a piece is not predicted, so it does not count.

    Raises:
      RequestError: fewer than two tokens, or ids that are none.
    """
    size = lm.max_length
    pieces = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    losses = [_losses(lm, piece) for piece in pieces if len(piece) > 1]
    if not losses:
        raise RequestError(
            "a perplexity needs pieces of two tokens at least: give a longer text or a larger max_length"
        )
    joined = np.concatenate(losses)
    value = float(np.exp(joined.mean()))
    error = float(joined.std()) / math.sqrt(len(joined))
    return Perplexity(value, value * error, len(joined))


def _losses(lm: LanguageModel, token_ids: Sequence[int]) -> np.ndarray:
    logits_TV = lm.logits(token_ids)[:-1].astype(np.float64)
    logits_TV -= logits_TV.max(axis=-1, keepdims=True)
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    return -logprobs_TV[np.arange(len(logprobs_TV)), token_ids[1:]]
