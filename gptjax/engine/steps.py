"""The jitted steps for generation loops of one's own, and the state they pass along.

`sample` then `advance` decodes one token: it can be read, and sent to its reader, while the device already works on the
next. The model is a static argument, so two models of one configuration share compiled code. Parameters are nested or
flat; flat ones cost the host less per call, and each kind is compiled separately. The engine has programs of its own.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine import sampling
from gptjax.engine.flat_params import AnyParams, FlatParams
from gptjax.layers.cache import KVCache
from gptjax.models import registry, shards
from gptjax.models.registry import Model
from pallas_kernels import dispatch
from pallas_kernels.pages import Tiles

CHUNK, LARGEST_CHUNK = 1024, 2048  # the most prompt tokens in one call; see `chunk_of`
SCORED_CHUNK = 512  # tokens whose logits are held together; for gpt-oss they are 0.8 MB each
_SMALLEST_BUCKET = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The whole state of a batch of sequences. A pytree; the steps donate it, so use what they return."""

    cache: KVCache
    history_BS: jax.Array  # int32: the tokens in the cache, by position; undefined beyond a row's length
    logits_BV: jax.Array  # float32: for the token after each row's last
    max_length: int = dataclasses.field(metadata={"static": True})  # positions a row may hold

    @property
    def batch(self) -> int:
        """B: the number of rows."""
        return self.logits_BV.shape[0]


def init_state(model: Model, *, batch: int, max_length: int, chunk: int | None = None) -> State:
    """A state of `batch` empty rows, for prompts in chunks of at most `chunk` tokens, by default `chunk_of(model)`."""
    cache = registry.create_cache(model, batch=batch, max_length=max_length, chunk=chunk or chunk_of(model))
    return State(
        cache=cache,
        history_BS=jnp.zeros((batch, cache.capacity), jnp.int32),
        # A row that was never filled draws -1 instead of a token.
        logits_BV=jnp.full((batch, model.config.vocab_size), jnp.nan, jnp.float32),
        max_length=max_length,
    )


def chunk_of(model: Model) -> int:
    """The most prompt tokens in one call: more if there are kernels for prompts.

    Kernels unpack an expert's weights once per call and skip masked scores. XLA's attention computes every query's
    scores with all keys that the last query sees.
    """
    return LARGEST_CHUNK if has_kernels_for_prompts(model) else CHUNK


def has_kernels_for_prompts(model: Model) -> bool:
    """Whether a model's prompts are read by kernels here."""
    return dispatch.wanted(model.implementation) == dispatch.MOSAIC and bool(model.dtype == jnp.bfloat16)


def chunks(length: int, largest: int = CHUNK) -> list[tuple[int, int, int]]:
    """Cuts a prompt into (start, tokens, bucket): whole chunks of `largest`, then the rest, padded to a power of two.

    If at least a quarter of a last chunk of `largest` would be padding, a chunk of half that size is cut off first. The
    cuts depend only on the length, so a prompt is computed the same way whatever else is running.
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


def padded_chunks(tokens: np.ndarray, largest: int, slot: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields a slot's sequence, int32 [T], as (start, real tokens, a chunk for `prefill_chunk` or `score_chunk`)."""
    for start, count, bucket in chunks(len(tokens), largest):
        yield start, count, padded(tokens, slot, start, count, bucket)


def padded(tokens: np.ndarray, slot: int, start: int, count: int, bucket: int) -> np.ndarray:
    """One of the `chunks` of a slot's sequence, int32 [T], for `prefill_chunk` or `score_chunk`."""
    chunk = np.zeros(3 + bucket, np.int32)
    chunk[:3] = slot, start, count
    chunk[3 : 3 + count] = tokens[start : start + count]
    return chunk


def _apply(model: Model, params: AnyParams, *arguments: jax.Array | KVCache, method: str | None = None) -> Any:
    nested = params.nested() if isinstance(params, FlatParams) else params
    if model.own.mesh is not None:
        run: Callable[..., Any] = shards.apply if method is None else shards.head
        return run(model, nested, *arguments)
    return model.apply({"params": nested}, *arguments, method=method)


def _run_chunk(model: Model, params: AnyParams, cache: KVCache, chunk: jax.Array) -> tuple[jax.Array, KVCache]:
    """Adds a padded chunk to a row. Returns its hidden states [1, T, D], and the cache with the row's new length."""
    slot_1, start, count, tokens_T = chunk[:1], chunk[1], chunk[2], chunk[3:]
    offset_T = jnp.arange(tokens_T.shape[0], dtype=jnp.int32)
    positions_1T = jnp.where(offset_T < count, start + offset_T, -1)[None]
    tiles = Tiles.of(positions_1T) if len(tokens_T) > 1 else None
    row = dataclasses.replace(cache.rows(slot_1), lengths_B=chunk[1:2], tiles=tiles)
    hidden_1TD, row = _apply(model, params, tokens_T[None], positions_1T, row)
    return hidden_1TD, cache.joined(slot_1, row)


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def prefill_chunk(model: Model, params: AnyParams, state: State, chunk: jax.Array) -> tuple[jax.Array, State]:
    """Adds a chunk of tokens to a row's sequence; a chunk that starts at 0 begins a new sequence.

    Compiled once per bucket for each number of the state's rows.

    Args:
      state: donated.
      chunk: int32 [3 + T]: the row, the position of its first token, the number of real tokens, and the tokens, padded
        to a bucket's length. A single array, because the host sends each array to the device separately.

    Returns:
      The logits [1, V] after the last token, and the state, of which these are the row's.
    """
    slot, start, count, tokens_T = chunk[0], chunk[1], chunk[2], chunk[3:]
    hidden_1TD, cache = _run_chunk(model, params, state.cache, chunk)
    last_1D = jax.lax.dynamic_index_in_dim(hidden_1TD, count - 1, axis=1, keepdims=False)
    logits_1V = _apply(model, params, last_1D, method="head")
    offset_T = jnp.arange(tokens_T.shape[0])
    place_T = jnp.where(offset_T < count, start + offset_T, cache.capacity)  # updates out of bounds are dropped
    return logits_1V, dataclasses.replace(
        state,
        cache=cache,
        history_BS=state.history_BS.at[slot, place_T].set(tokens_T, mode="drop"),
        logits_BV=state.logits_BV.at[slot].set(logits_1V[0]),
    )


@partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def score_chunk(model: Model, params: AnyParams, cache: KVCache, chunk: jax.Array) -> tuple[jax.Array, KVCache]:
    """Like `prefill_chunk` for a cache alone, with the logits [T, V] at every position of the chunk."""
    hidden_1TD, cache = _run_chunk(model, params, cache, chunk)
    return _apply(model, params, hidden_1TD[0], method="head"), cache


@jax.jit
def sample(state: State, settings: sampling.Sampling) -> sampling.Sampled:
    """Draws the next token of every row."""

    def counts() -> jax.Array:
        return sampling.output_counts(state.history_BS, state.cache.lengths_B, state.logits_BV.shape[1])

    return sampling.sample(state.logits_BV, state.cache.lengths_B, settings, counts)


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def advance(model: Model, params: AnyParams, state: State, token_B: jax.Array) -> State:
    """Adds a token to every row. A row that is full, or a token of -1, makes the row's logits NaN.

    Args:
      state: donated.
      token_B: int32.
    """
    lengths_B = state.cache.lengths_B
    fits_B = (lengths_B < state.max_length) & (token_B >= 0)
    positions_B = jnp.where(fits_B, lengths_B, -1)
    hidden_B1D, cache = _apply(model, params, token_B[:, None], positions_B[:, None], state.cache)
    logits_BV = jnp.where(fits_B[:, None], _apply(model, params, hidden_B1D[:, 0], method="head"), jnp.nan)
    place_B = jnp.where(fits_B, lengths_B, cache.capacity)  # updates out of bounds are dropped
    history_BS = state.history_BS.at[jnp.arange(state.batch), place_B].set(token_B, mode="drop")
    return dataclasses.replace(state, cache=cache, history_BS=history_BS, logits_BV=logits_BV)


def prefill(model: Model, params: AnyParams, state: State, slot: int, tokens: np.ndarray) -> State:
    """Fills a row of a state with a sequence, from position 0.

    Args:
      state: donated; it must be for chunks of `chunk_of(model)`.
      tokens: int32 [T], 1 <= T <= max_length.
    """
    if not len(tokens):
        raise ValueError("a sequence needs at least one token")
    for _, _, chunk in padded_chunks(tokens, chunk_of(model), slot):
        _, state = prefill_chunk(model, params, state, chunk)
    return state
