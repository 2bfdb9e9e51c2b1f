"""Slots on one compiled decode step: requests join and leave at any step, rows do not affect each other."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import sampling
from gptjax.engine import steps
from gptjax.engine.request import Request
from gptjax.models.registry import Model, Params


@dataclasses.dataclass(frozen=True)
class Token:
    """One token that a slot produced."""

    slot: int
    token_id: int  # -1 where the model's logits were not finite
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), most likely first


class Engine:
    """A batch of `batch` slots. Not thread-safe: one engine belongs to one thread at a time.

    `admit` prefills a request into a free slot, `step` gives every busy slot one token, `release` frees a slot. A
    slot that has filled its cache must be released; until then its further tokens are -1.
    """

    def __init__(self, model: Model, params: Params, *, batch: int, max_length: int):
        self.model = model
        self.params = params
        self.max_length = max_length
        self._state = steps.init_state(model, batch=batch, max_length=max_length)
        self._requests: list[Request | None] = [None] * batch
        self._settings: sampling.Sampling | None = None  # of the rows as they are; None where they changed
        self._active_B: jax.Array | None = None

    @property
    def batch(self) -> int:
        """B: the number of slots."""
        return len(self._requests)

    @property
    def free_slots(self) -> list[int]:
        """The slots without a request."""
        return [slot for slot, request in enumerate(self._requests) if request is None]

    @property
    def busy(self) -> bool:
        """Whether any slot has a request."""
        return any(self._requests)

    def admit(self, slot: int, request: Request) -> None:
        """Prefills a checked request with a seed into a free slot, in chunks whose cuts depend on its length alone."""
        if self._requests[slot] is not None:
            raise ValueError(f"slot {slot} is busy")
        tokens = np.asarray(request.prompt_ids, np.int32)
        self._state = prefill(self.model, self.params, self._state, slot, tokens)
        self._requests[slot] = request
        self._settings = self._active_B = None

    def release(self, slot: int) -> None:
        """Frees a slot. What it held is overwritten by the next request."""
        self._requests[slot] = None
        self._settings = self._active_B = None

    def step(self) -> list[Token]:
        """One token for every busy slot. When it returns, the device already works on the step after."""
        if self._settings is None or self._active_B is None:
            self._settings = settings_of(self._requests, self.model.config.vocab_size)
            self._active_B = jnp.asarray([request is not None for request in self._requests])
        sampled = steps.sample(self._state, self._settings)
        self._state = steps.advance(self.model, self.params, self._state, sampled.token_B, self._active_B)
        host = jax.device_get(sampled)
        return [_token(host, slot) for slot, request in enumerate(self._requests) if request is not None]


def prefill(model: Model, params: Params, state: steps.State, slot: int, tokens: np.ndarray) -> steps.State:
    """Fills a row with a sequence from its start. `tokens` is int32 [T], 1 <= T <= max_length."""
    for start, padded, count in steps.padded_chunks(tokens):
        state = steps.prefill_chunk(model, params, state, np.int32(slot), padded, np.int32(start), np.int32(count))
    return state


def settings_of(requests: Sequence[Request | None], vocab_size: int) -> sampling.Sampling:
    """The rows' settings as arrays; what no row uses is None, so that it is not computed."""
    rows = [None if request is None else request.params for request in requests]
    given = [params for params in rows if params is not None]

    def column(name: str, off: float, dtype: type[np.generic]) -> jax.Array:
        return jnp.asarray([off if params is None else getattr(params, name) for params in rows], dtype)

    seeds = [0 if params is None else params.seed or 0 for params in rows]
    settings = sampling.Sampling(
        seed_B=jnp.asarray(np.asarray(seeds, np.uint32)),
        num_top=max((params.top_logprobs for params in given), default=0),
    )
    changes: dict[str, Any] = {}
    if any(params.temperature > 0 for params in given):
        changes["temperature_B"] = column("temperature", 0.0, np.float32)
    if any(params.truncates for params in given):
        changes["truncation"] = sampling.Truncation(
            top_k_B=column("top_k", 0, np.int32),
            top_p_B=column("top_p", 1.0, np.float32),
            min_p_B=column("min_p", 0.0, np.float32),
        )
    if any(params.penalises for params in given):
        prompt_lengths = [0 if request is None else len(request.prompt_ids) for request in requests]
        changes["penalties"] = sampling.Penalties(
            repetition_B=column("repetition_penalty", 1.0, np.float32),
            presence_B=column("presence_penalty", 0.0, np.float32),
            frequency_B=column("frequency_penalty", 0.0, np.float32),
            prompt_lengths_B=jnp.asarray(prompt_lengths, jnp.int32),
        )
    if any(params.logit_bias for params in given):
        bias_BV = np.zeros((len(rows), vocab_size), np.float32)
        for row, params in enumerate(rows):
            for token, bias in (params.logit_bias if params is not None else {}).items():
                bias_BV[row, token] = bias
        changes["bias_BV"] = jnp.asarray(bias_BV)
    return dataclasses.replace(settings, **changes)


def _token(sampled: sampling.Sampled, slot: int) -> Token:
    top = zip(sampled.top_ids_BC[slot].tolist(), sampled.top_logprobs_BC[slot].tolist(), strict=True)
    return Token(slot, int(sampled.token_B[slot]), float(sampled.logprob_B[slot]), tuple(top))
