"""Turns requests into the sampler's arrays of settings, and decides which parts of it are compiled."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gptjax.engine import sampling
from gptjax.engine.request import MAX_BIASES, MAX_TOP_LOGPROBS, Request, SamplingParams
from gptjax.sharding.hosts import put
from gptjax.structured.matching import words_of

Words = np.ndarray | None
"""Which tokens rows may draw, int32 [B, W]: bit t % 32 of word t // 32 is token t's. None: any."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Which parts of sampling are compiled."""

    draws: bool = False
    truncates: bool = False
    penalises: bool = False
    biases: bool = False
    constrains: bool = False
    num_top: int = 0  # rounded up to one of a few sizes

    @classmethod
    def of(cls, params: SamplingParams) -> "Features":
        """The features that one request uses."""
        num_top = next(size for size in (0, 5, MAX_TOP_LOGPROBS) if size >= params.top_logprobs)
        biases = bool(params.logit_bias)
        return cls(params.temperature > 0, params.truncates, params.penalises, biases, num_top=num_top)

    @classmethod
    def of_request(cls, request: Request) -> "Features":
        """Those, and whether it has a grammar."""
        return cls.of(request.params) | cls(constrains=request.grammar is not None)

    @classmethod
    def everything(cls) -> "Features":
        """All that there are."""
        return cls(True, True, True, True, True, num_top=MAX_TOP_LOGPROBS)

    def __or__(self, other: "Features") -> "Features":
        return Features(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


def settings_of(
    requests: Sequence[Request | None],
    vocab_size: int,
    features: Features,
    *,
    branches: bool = False,
    device: jax.sharding.Sharding | None = None,
) -> sampling.Sampling:
    """The rows' settings as arrays; those not in `features` are None and are not computed.

    Args:
      branches: whether to skip at run time what no row uses: see `Sampling`.
      device: where the arrays go; None: to the default device.
    """
    off = SamplingParams(seed=0)
    rows = [off if request is None else request.params for request in requests]

    def column(name: str, dtype: type[np.generic]) -> jax.Array:
        values = [getattr(params, name) for params in rows]
        # A k beyond the vocabulary keeps all tokens, and may not fit in int32.
        values = [min(value, vocab_size) for value in values] if name == "top_k" else values
        return _on_device(np.asarray(values, dtype), device)

    return sampling.Sampling(
        seed_B=column("seed", np.uint32),
        temperature_B=column("temperature", np.float32) if features.draws else None,
        truncation=sampling.Truncation(
            top_k_B=column("top_k", np.int32),
            top_p_B=column("top_p", np.float32),
            min_p_B=column("min_p", np.float32),
        )
        if features.truncates
        else None,
        penalties=sampling.Penalties(
            repetition_B=column("repetition_penalty", np.float32),
            presence_B=column("presence_penalty", np.float32),
            frequency_B=column("frequency_penalty", np.float32),
        )
        if features.penalises
        else None,
        bias=_bias(rows, vocab_size, device) if features.biases else None,
        allowed_BW=_words(all_allowed(len(rows), vocab_size), device) if features.constrains else None,
        top_B=column("top_logprobs", np.int32) if branches else None,
        num_top=min(features.num_top, vocab_size),
        branches=branches,
    )


def all_allowed(rows: int, vocab_size: int) -> np.ndarray:
    """The words of rows that may draw any token, int32, as `Compiler.fill` takes them."""
    return np.full((rows, words_of(vocab_size)), -1, np.int32)


def with_allowed(
    settings: sampling.Sampling, words_BW: Words, device: jax.sharding.Sharding | None
) -> sampling.Sampling:
    """The settings of the same rows, with the tokens that they may draw now."""
    return settings if words_BW is None else dataclasses.replace(settings, allowed_BW=_words(words_BW, device))


def _words(words_BW: np.ndarray, device: jax.sharding.Sharding | None) -> jax.Array:
    return _on_device(words_BW.view(np.uint32), device)


def _bias(rows: Sequence[SamplingParams], vocab_size: int, device: jax.sharding.Sharding | None) -> sampling.Bias:
    ids_BM = np.full((len(rows), MAX_BIASES), vocab_size, np.int32)
    values_BM = np.zeros((len(rows), MAX_BIASES), np.float32)
    for row, params in enumerate(rows):
        count = len(params.logit_bias)
        ids_BM[row, :count] = list(params.logit_bias)
        values_BM[row, :count] = list(params.logit_bias.values())
    return sampling.Bias(_on_device(ids_BM, device), _on_device(values_BM, device))


def _on_device(array: np.ndarray, device: jax.sharding.Sharding | None) -> jax.Array:
    """(`jnp.asarray` compiles something for each new shape.)"""
    return put(array, device)
