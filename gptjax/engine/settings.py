"""Turns requests into the sampler's arrays of settings, and decides which parts of it are compiled."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine import sampling
from gptjax.engine.request import MAX_TOP_LOGPROBS, Request, SamplingParams


@dataclasses.dataclass(frozen=True)
class Features:
    """Which parts of sampling are compiled: those that any row so far has used, so that they change rarely."""

    draws: bool = False
    truncates: bool = False
    penalises: bool = False
    biases: bool = False
    num_top: int = 0  # rounded up to one of a few sizes

    @classmethod
    def of(cls, params: SamplingParams) -> "Features":
        """The features that one request uses."""
        num_top = next(size for size in (0, 5, MAX_TOP_LOGPROBS) if size >= params.top_logprobs)
        return cls(params.temperature > 0, params.truncates, params.penalises, bool(params.logit_bias), num_top)

    def __or__(self, other: "Features") -> "Features":
        return Features(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


def settings_of(requests: Sequence[Request | None], vocab_size: int, features: Features) -> sampling.Sampling:
    """The rows' settings as arrays; those not in `features` are None and are not computed."""
    off = SamplingParams(seed=0)
    rows = [off if request is None else request.params for request in requests]

    def column(name: str, dtype: type[np.generic]) -> jax.Array:
        values = [getattr(params, name) for params in rows]
        # A k beyond the vocabulary keeps all tokens, and may not fit in int32.
        return jnp.asarray(
            np.asarray([min(value, vocab_size) for value in values] if name == "top_k" else values, dtype)
        )

    bias_BV = None
    if features.biases:
        bias_BV = np.zeros((len(rows), vocab_size), np.float32)
        for row, params in enumerate(rows):
            for token, bias in params.logit_bias.items():
                bias_BV[row, token] = bias
    prompt_lengths = [0 if request is None else len(request.prompt_ids) for request in requests]
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
            prompt_lengths_B=jnp.asarray(prompt_lengths, jnp.int32),
        )
        if features.penalises
        else None,
        bias_BV=None if bias_BV is None else jnp.asarray(bias_BV),
        num_top=min(features.num_top, vocab_size),
    )
