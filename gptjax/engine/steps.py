"""The jitted steps that make up all generation, and the state they pass along.

`sample` then `advance` decodes one token: it can be read, and sent to its reader, while the device already works on the
next. `decode` does several in one call, for devices that compute a step faster than the host can dispatch it. The model
is a static argument, so two models of one configuration share compiled code. Parameters are nested or flat; flat ones
cost the host less per call, and each kind is compiled separately.
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

CHUNK, LARGEST_CHUNK = 1024, 2048  # the most prompt tokens in one call; see `chunk_of`
SCORED_CHUNK = 512  # tokens whose logits are held together; for gpt-oss they are 0.8 MB each
_SMALLEST_BUCKET = 32

Rings = tuple[tuple[jax.Array, jax.Array], ...]  # k and v [1, K, S, H] of each sliding layer


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


def init_state(model: Model, *, batch: int, max_length: int) -> State:
    """A state of `batch` empty rows."""
    cache = registry.create_cache(model, batch=batch, max_length=max_length)
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
    kernels = dispatch.wanted(model.implementation) == dispatch.MOSAIC and model.dtype == jnp.bfloat16
    return LARGEST_CHUNK if kernels else CHUNK


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


def padded_chunks(tokens: np.ndarray, largest: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields a sequence, int32 [T], as (start, real tokens, a chunk for `prefill_chunk` or `score_chunk`)."""
    for start, count, bucket in chunks(len(tokens), largest):
        yield start, count, padded(tokens, start, count, bucket)


def padded(tokens: np.ndarray, start: int, count: int, bucket: int) -> np.ndarray:
    """One of the `chunks` of a sequence, int32 [T], for `prefill_chunk` or `score_chunk`."""
    chunk = np.zeros(2 + bucket, np.int32)
    chunk[:2] = start, count
    chunk[2 : 2 + count] = tokens[start : start + count]
    return chunk


def history(tokens: np.ndarray, capacity: int) -> np.ndarray:
    """The history [S] of a sequence, int32 [T], for `insert`."""
    history_S = np.zeros(capacity, np.int32)
    history_S[: len(tokens)] = tokens
    return history_S


def _apply(model: Model, params: AnyParams, *arguments: jax.Array | KVCache, method: str | None = None) -> Any:
    nested = params.nested() if isinstance(params, FlatParams) else params
    return model.apply({"params": nested}, *arguments, method=method)


def _run_chunk(model: Model, params: AnyParams, row: KVCache, chunk: jax.Array) -> tuple[jax.Array, KVCache]:
    """Runs a padded chunk on a one-row cache. Returns hidden states [1, T, D] and the cache, `start + count` long."""
    start, count, tokens_T = chunk[0], chunk[1], chunk[2:]
    row = dataclasses.replace(row, lengths_B=jnp.full_like(row.lengths_B, start))
    offset_T = jnp.arange(tokens_T.shape[0], dtype=jnp.int32)
    positions_1T = jnp.where(offset_T < count, start + offset_T, -1)[None]
    hidden_1TD, new_row = _apply(model, params, tokens_T[None], positions_1T, row)
    return hidden_1TD, new_row


@partial(jax.jit, static_argnames=("model",), donate_argnames=("row",))
def prefill_chunk(model: Model, params: AnyParams, row: KVCache, chunk: jax.Array) -> tuple[jax.Array, KVCache]:
    """Adds a chunk of tokens to a sequence; a chunk that starts at 0 begins a new sequence.

    Works on a one-row cache, so it is compiled once per bucket, whatever the state's number of rows.

    Args:
      row: a one-row cache, donated.
      chunk: int32 [2 + T]: the position of its first token, the number of real tokens, and the tokens, padded to a
        bucket's length. A single array, because the host sends each array to the device separately.

    Returns:
      The logits [1, V] after the last token, and the cache.
    """
    hidden_1TD, row = _run_chunk(model, params, row, chunk)
    last_1D = jax.lax.dynamic_index_in_dim(hidden_1TD, chunk[1] - 1, axis=1, keepdims=False)
    return _apply(model, params, last_1D, method="head"), row


@partial(jax.jit, static_argnames=("model",), donate_argnames=("row",))
def score_chunk(model: Model, params: AnyParams, row: KVCache, chunk: jax.Array) -> tuple[jax.Array, KVCache]:
    """Like `prefill_chunk`, with the logits [T, V] at every position of the chunk."""
    hidden_1TD, row = _run_chunk(model, params, row, chunk)
    return _apply(model, params, hidden_1TD[0], method="head"), row


@partial(jax.jit, donate_argnames=("state",))
def insert(state: State, slot: jax.Array, row: KVCache, history_S: jax.Array, logits_1V: jax.Array) -> State:
    """Replaces one row of the state with a prefilled sequence.

    Args:
      slot: int32 scalar.
      row: the one-row cache that `prefill_chunk` returned.
      history_S: int32, the sequence's tokens, padded to the cache's capacity.
      logits_1V: the logits that `prefill_chunk` returned.
    """
    return dataclasses.replace(
        state,
        cache=state.cache.with_row(slot, row),
        history_BS=state.history_BS.at[slot].set(history_S),
        logits_BV=state.logits_BV.at[slot].set(logits_1V[0]),
    )


@jax.jit
def rings(row: KVCache) -> Rings:
    """A copy of the sliding layers of a one-row cache, which later tokens overwrite."""
    layers = zip(row.k, row.v, strict=True)
    return tuple((jnp.copy(k), jnp.copy(v)) for k, v in layers if k.shape[2] < row.capacity)


@jax.jit
def extract(state: State, slot: jax.Array, rings: Rings) -> KVCache:
    """A one-row cache for `prefill_chunk` to continue from: a slot's, with the saved rings.

    Args:
      slot: int32 scalar. The full-attention layers must still hold the positions to continue from.
      rings: what `rings` returned right after the last of these positions was added.
    """
    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=0), state.cache)
    copies = iter(jax.tree.map(jnp.copy, rings))  # otherwise donating the row would also donate the saved rings
    layers = zip(row.k, row.v, strict=True)
    k, v = zip(*(next(copies) if k.shape[2] < row.capacity else (k, v) for k, v in layers), strict=True)
    return dataclasses.replace(row, k=k, v=v)


@jax.jit
def sample(state: State, settings: sampling.Sampling) -> sampling.Sampled:
    """Draws the next token of every row. Tokens of unused rows are meaningless."""
    return sampling.sample(state.logits_BV, state.cache.lengths_B, settings, state.history_BS)


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def advance(model: Model, params: AnyParams, state: State, token_B: jax.Array, active_B: jax.Array) -> State:
    """Adds a token to every active row. A row that is full, or a token of -1, makes the row's logits NaN.

    Args:
      token_B: int32.
      active_B: bool; other rows and their logits are unchanged.
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
    """`sample` then `advance`, `num_steps` times in one call; bit-identical to calling them one by one.

    The number of steps is static: the host would wait at each turn of a loop whose end only the device knows.

    Args:
      active_B: bool; other rows are unchanged.

    Returns:
      The state, and the tokens of all steps: a `Sampled` whose arrays have the steps as an additional first axis.
    """

    def step(state: State, _: None) -> tuple[State, sampling.Sampled]:
        sampled = sample(state, settings)
        return advance(model, params, state, sampled.token_B, active_B), sampled

    return jax.lax.scan(step, state, length=num_steps)
