"""The jitted steps that all generation is made of, and the state they pass along.

`sample` then `advance` is one decoded token: a token can be read, and sent to its reader, while the device already
works on the next. `decode` is several of them in one call, for devices that compute a step faster than the host can
ask for it. Each step takes the model as a static argument, so two models of one configuration share what was compiled.
Parameters are nested or flat; flat ones cost the host less at each call, and each kind is compiled for itself.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine import sampling
from gptjax.engine.flat_params import AnyParams, FlatParams
from gptjax.layers.cache import KVCache
from gptjax.models import registry
from gptjax.models.registry import Model
from pallas_kernels import dispatch

CHUNK, LARGEST_CHUNK = 1024, 2048  # prompt tokens in one call, at most; see `chunk_of`
SCORED_CHUNK = 512  # tokens whose logits are held together, which for gpt-oss are 0.8 MB each
_SMALLEST_BUCKET = 32

Rings = tuple[tuple[jax.Array, jax.Array], ...]  # k and v [1, K, S, H] of each layer that slides


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a batch of sequences is. A pytree; the steps donate it, so use what they return."""

    cache: KVCache
    history_BS: jax.Array  # int32: the tokens in the cache, by position; undefined beyond a row's length
    logits_BV: jax.Array  # float32: what follows the last token of each row
    max_length: int = dataclasses.field(metadata={"static": True})  # positions a row may hold

    @property
    def batch(self) -> int:
        """B: the number of rows."""
        return self.logits_BV.shape[0]


def init_state(model: Model, *, batch: int, max_length: int) -> State:
    """A state of `batch` empty rows."""
    cache = registry.create_cache(model, batch=batch, max_length=max_length)
    return State(
        cache=cache,
        history_BS=jnp.zeros((batch, cache.capacity), jnp.int32),
        # A row that was never filled draws -1, not a token.
        logits_BV=jnp.full((batch, model.config.vocab_size), jnp.nan, jnp.float32),
        max_length=max_length,
    )


def chunk_of(model: Model) -> int:
    """Prompt tokens in one call, at most: more where there are kernels for prompts.

    Kernels unpack an expert's weights once a call, and compute no scores that are not seen. XLA's attention computes
    those of every query with all that the last one sees.
    """
    kernels = dispatch.wanted(model.implementation) == dispatch.MOSAIC and model.dtype == jnp.bfloat16
    return LARGEST_CHUNK if kernels else CHUNK


def chunks(length: int, largest: int = CHUNK) -> list[tuple[int, int, int]]:
    """Cuts a prompt into (start, tokens, bucket): whole chunks of `largest`, then the rest, padded to a power of two.

    Where a quarter or more of a last chunk of `largest` would be padding, half of one comes before the rest. The cuts
    depend on the length alone, so a prompt is computed the same whatever else is going on.
    """
    cuts = [(start, largest, largest) for start in range(0, length - largest + 1, largest)]
    rest = length - len(cuts) * largest
    half = max(largest // 2, _SMALLEST_BUCKET)
    if half < rest <= largest * 3 // 4:
        cuts.append((length - rest, half, half))
        rest -= half
    if rest:
        bucket = max(_SMALLEST_BUCKET, 1 << (rest - 1).bit_length())
        cuts.append((length - rest, rest, min(bucket, largest)))
    return cuts


def padded_chunks(tokens: np.ndarray, largest: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """A sequence, int32 [T], as (start, tokens that count, the chunk as `prefill_chunk` and `score_chunk` take it)."""
    for start, count, bucket in chunks(len(tokens), largest):
        yield start, count, padded(tokens, start, count, bucket)


def padded(tokens: np.ndarray, start: int, count: int, bucket: int) -> np.ndarray:
    """One of the `chunks` of a sequence, int32 [T], as `prefill_chunk` and `score_chunk` take it."""
    chunk = np.zeros(2 + bucket, np.int32)
    chunk[:2] = start, count
    chunk[2 : 2 + count] = tokens[start : start + count]
    return chunk


def history(tokens: np.ndarray, capacity: int) -> np.ndarray:
    """A sequence, int32 [T], as the history [S] that `insert` takes."""
    history_S = np.zeros(capacity, np.int32)
    history_S[: len(tokens)] = tokens
    return history_S


def _apply(model: Model, params: AnyParams, *arguments: jax.Array | KVCache, method: str | None = None) -> Any:
    nested = params.nested() if isinstance(params, FlatParams) else params
    return model.apply({"params": nested}, *arguments, method=method)


def _run_chunk(model: Model, params: AnyParams, row: KVCache, chunk: jax.Array) -> tuple[jax.Array, KVCache]:
    """Runs a padded chunk over a cache of one row: hidden states [1, T, D] and the cache, `start + count` long."""
    start, count, tokens_T = chunk[0], chunk[1], chunk[2:]
    row = dataclasses.replace(row, lengths_B=jnp.full_like(row.lengths_B, start))
    offset_T = jnp.arange(tokens_T.shape[0], dtype=jnp.int32)
    positions_1T = jnp.where(offset_T < count, start + offset_T, -1)[None]
    hidden_1TD, new_row = _apply(model, params, tokens_T[None], positions_1T, row)
    return hidden_1TD, new_row


@partial(jax.jit, static_argnames=("model",), donate_argnames=("row",))
def prefill_chunk(model: Model, params: AnyParams, row: KVCache, chunk: jax.Array) -> tuple[jax.Array, KVCache]:
    """Adds some tokens to a sequence; a chunk that starts at 0 begins a new one.

    Works on a cache of one row, so it is compiled once a bucket, whatever the number of rows of the state.

    Args:
      row: a cache with one slot, donated.
      chunk: int32 [2 + T]: the position of its first token, how many of its tokens count, and the tokens with any
        padding up to a bucket's length. One array, as the host sends each to the device by itself.

    Returns:
      The logits [1, V] of what follows the last token, and the cache.
    """
    hidden_1TD, row = _run_chunk(model, params, row, chunk)
    last_1D = jax.lax.dynamic_index_in_dim(hidden_1TD, chunk[1] - 1, axis=1, keepdims=False)
    return _apply(model, params, last_1D, method="head"), row


@partial(jax.jit, static_argnames=("model",), donate_argnames=("row",))
def score_chunk(model: Model, params: AnyParams, row: KVCache, chunk: jax.Array) -> tuple[jax.Array, KVCache]:
    """As `prefill_chunk`, with the logits [T, V] at every position of the chunk."""
    hidden_1TD, row = _run_chunk(model, params, row, chunk)
    return _apply(model, params, hidden_1TD[0], method="head"), row


@partial(jax.jit, donate_argnames=("state",))
def insert(state: State, slot: jax.Array, row: KVCache, history_S: jax.Array, logits_1V: jax.Array) -> State:
    """The state with a prefilled sequence in one of its rows, in place of what was there.

    Args:
      slot: int32 scalar.
      row: a cache with one slot, as `prefill_chunk` gave it.
      history_S: int32, the sequence's tokens, padded to the cache's capacity.
      logits_1V: what `prefill_chunk` gave with it.
    """
    return dataclasses.replace(
        state,
        cache=state.cache.with_row(slot, row),
        history_BS=state.history_BS.at[slot].set(history_S),
        logits_BV=state.logits_BV.at[slot].set(logits_1V[0]),
    )


@jax.jit
def rings(row: KVCache) -> Rings:
    """A copy of what the sliding layers of a cache of one row hold, which further tokens overwrite."""
    layers = zip(row.k, row.v, strict=True)
    return tuple((jnp.copy(k), jnp.copy(v)) for k, v in layers if k.shape[2] < row.capacity)


@jax.jit
def extract(state: State, slot: jax.Array, rings: Rings) -> KVCache:
    """A cache of one row for `prefill_chunk` to go on from: a slot's, with its rings as they were.

    Args:
      slot: int32 scalar. All layers that do not slide must still hold the positions to go on from.
      rings: what `rings` gave when the last of these positions had been added.
    """
    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=0), state.cache)
    copies = iter(jax.tree.map(jnp.copy, rings))  # else the row would be donated, and what is kept with it
    layers = zip(row.k, row.v, strict=True)
    k, v = zip(*(next(copies) if k.shape[2] < row.capacity else (k, v) for k, v in layers), strict=True)
    return dataclasses.replace(row, k=k, v=v)


@jax.jit
def sample(state: State, settings: sampling.Sampling) -> sampling.Sampled:
    """Draws the next token of every row. Rows that are not in use give a token of no meaning."""
    return sampling.sample(state.logits_BV, state.cache.lengths_B, settings, state.history_BS)


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def advance(model: Model, params: AnyParams, state: State, token_B: jax.Array, active_B: jax.Array) -> State:
    """Adds a token to every active row. A row that is full, or a token of -1, makes the row's logits NaN.

    Args:
      token_B: int32.
      active_B: bool; the other rows stay as they are, and so do their logits.
    """
    lengths_B = state.cache.lengths_B
    fits_B = (lengths_B < state.max_length) & (token_B >= 0)
    positions_B1 = jnp.where(active_B & fits_B, lengths_B, -1)[:, None]
    hidden_B1D, cache = _apply(model, params, token_B[:, None], positions_B1, state.cache)
    logits_BV = _apply(model, params, hidden_B1D[:, 0], method="head")
    logits_BV = jnp.where(fits_B[:, None], logits_BV, jnp.nan)
    slot_B1 = jnp.where(positions_B1 < 0, state.history_BS.shape[1], positions_B1)
    row_B1 = jnp.arange(token_B.shape[0])[:, None]
    return dataclasses.replace(
        state,
        cache=cache,
        history_BS=state.history_BS.at[row_B1, slot_B1].set(token_B[:, None], mode="drop"),
        logits_BV=jnp.where(active_B[:, None], logits_BV, state.logits_BV),
    )


@partial(jax.jit, static_argnames=("model", "num_steps"), donate_argnames=("state",))
def decode(
    model: Model, params: AnyParams, state: State, settings: sampling.Sampling, active_B: jax.Array, num_steps: int
) -> tuple[State, sampling.Sampled]:
    """`sample` then `advance`, so many times over, in one call; to the bit what they give one by one.

    The number of steps is static: the host waits at each turn of a loop whose end only the device knows.

    Args:
      active_B: bool; the other rows stay as they are.

    Returns:
      The state, and the tokens of all steps: a `Sampled` whose arrays have the steps as an axis before their own.
    """

    def step(state: State, _: None) -> tuple[State, sampling.Sampled]:
        sampled = sample(state, settings)
        return advance(model, params, state, sampled.token_B, active_B), sampled

    return jax.lax.scan(step, state, length=num_steps)
