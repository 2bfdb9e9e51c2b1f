"""Sampling, from logits to tokens: pure, jittable, and independent for each row.

A row's draw depends only on its own logits, settings, seed and position: the key is `fold_in(key(seed), position)`,
with the position of the token being drawn. Nothing here sorts the vocabulary: top-k and top-p are thresholds, found by
bisecting the ordered bits of float32, so the cost is a fixed number of passes whatever k and p are.

Sums over the vocabulary must not depend on how many rows there are either, and on a GPU XLA may divide a sum otherwise
for other numbers of rows. So log-probabilities are from `logits.summary`, and top-p adds integers.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels import same_bits
from pallas_kernels.logits import Summary, summary
from pallas_kernels.logits.reference import first_largest

_INT32 = jnp.iinfo(jnp.int32)
_LEAST_P = 1e-30
_LEAST_TEMPERATURE = 1e-6  # below it the division overflows; the draw is the argmax long before
_T = TypeVar("_T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truncation:
    """Which tokens a draw may come from. Ties at a threshold are all kept."""

    top_k_B: jax.Array  # int32: the k most likely; 0 keeps all
    top_p_B: jax.Array  # float32: the fewest tokens whose probability reaches p; 1 keeps all
    min_p_B: jax.Array  # float32: those at least p times as likely as the most likely; 0 keeps all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """Penalties on tokens already in a row's text."""

    repetition_B: jax.Array  # float32: prompt and output; positive logits divided by it, negative ones multiplied
    presence_B: jax.Array  # float32: output only; subtracted once
    frequency_B: jax.Array  # float32: output only; subtracted for each occurrence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
    """What is added to the logits of some tokens."""

    ids_BM: jax.Array  # int32, each at most once a row; V for none
    values_BM: jax.Array  # float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of all rows. A field of None is off for every row and costs nothing."""

    seed_B: jax.Array  # uint32
    temperature_B: jax.Array | None = None  # float32; 0 is argmax. None: argmax for all
    truncation: Truncation | None = None
    penalties: Penalties | None = None
    bias: Bias | None = None
    # uint32: bit t % 32 of word t // 32 is set if token t may be drawn; further bits mean nothing.
    allowed_BW: jax.Array | None = None
    top_B: jax.Array | None = None  # int32: how many top log-probabilities each row wants; at most `num_top`
    num_top: int = dataclasses.field(default=0, metadata={"static": True})  # how many top log-probabilities to report
    # Whether to skip, at run time, what no row uses. The tokens are the same.
    branches: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """A token a row. Log-probabilities are the model's own: before temperature, penalties, bias, grammar and
    truncation."""

    token_B: jax.Array  # int32; -1 if the row's logits are not finite
    logprob_B: jax.Array  # float32
    top_ids_BC: jax.Array  # int32, most likely first; C = num_top
    top_logprobs_BC: jax.Array  # float32


def sample(
    logits_BV: jax.Array,
    positions_B: jax.Array,
    sampling: Sampling,
    counts: Callable[[], jax.Array] | None = None,
) -> Sampled:
    """Draws a token for every row.

    Args:
      logits_BV: float32.
      positions_B: int32, the position of the token to draw.
      sampling: the rows' settings.
      counts: makes counts_BV, int32, of each token: twice the times that it is in the row's output, plus 1 if it is in
        its prompt. Only needed for penalties, and only called for these.
    """
    if sampling.penalties is not None and counts is None:
        raise ValueError("penalties need the counts of each row's tokens")
    found = summary(logits_BV)
    log_total_B = same_bits.log(found.total_B)

    def logprobs(ids_BC: jax.Array) -> jax.Array:
        below_BC = jnp.take_along_axis(logits_BV, ids_BC, axis=-1) - found.largest_B[:, None]
        return below_BC - log_total_B[:, None]

    token_B = _token(logits_BV, found, positions_B, sampling, counts)
    finite_B = jnp.isfinite(found.largest_B) & jnp.isfinite(found.total_B)
    top_ids_BC, top_logprobs_BC = _top(logits_BV, logprobs, sampling)
    return Sampled(
        token_B=jnp.where(finite_B, token_B, -1).astype(jnp.int32),
        logprob_B=logprobs(token_B[:, None])[:, 0],
        top_ids_BC=top_ids_BC,
        top_logprobs_BC=top_logprobs_BC,
    )


def output_counts(history_BS: jax.Array, lengths_B: jax.Array, vocab_size: int) -> jax.Array:
    """The counts for `sample` of rows whose tokens are all output, int32 [B, V].

    Args:
      history_BS: int32, their tokens by position.
      lengths_B: int32: how many they have.
    """
    in_text_BS = jnp.arange(history_BS.shape[1]) < lengths_B[:, None]
    row_B1 = jnp.arange(history_BS.shape[0])[:, None]
    counts_BV = jnp.zeros((history_BS.shape[0], vocab_size), jnp.int32)
    return counts_BV.at[row_B1, history_BS].add(2 * in_text_BS.astype(jnp.int32), mode="drop")


def _token(
    logits_BV: jax.Array,
    found: Summary,
    positions_B: jax.Array,
    sampling: Sampling,
    counts: Callable[[], jax.Array] | None,
) -> jax.Array:
    """A token for every row, int32; anything if its logits are not finite. `found` is of the logits."""
    shapes, forbids = _shapes(sampling, logits_BV.shape[-1]), _forbids(sampling)
    if shapes is not None:
        logits_BV = _if_used(shapes, sampling, lambda logits_BV: _shaped(logits_BV, sampling, counts), logits_BV)
    if forbids is not None:
        logits_BV = _if_used(forbids, sampling, lambda logits_BV: _allowed(logits_BV, sampling), logits_BV)
    changes = [each for each in (shapes, forbids) if each is not None]
    if changes:
        found = _if_used(functools.reduce(operator.or_, changes), sampling, lambda _: summary(logits_BV), found)
    if sampling.temperature_B is None:
        return found.token_B
    temperature_B = sampling.temperature_B

    def drawn(likeliest_B: jax.Array) -> jax.Array:
        below_BV = logits_BV - found.largest_B[:, None]  # so that a small temperature cannot overflow
        return jnp.where(temperature_B > 0, _draw(below_BV, positions_B, temperature_B, sampling), likeliest_B)

    return _if_used((temperature_B > 0).any(), sampling, drawn, found.token_B)


def _if_used(uses: jax.Array, sampling: Sampling, change: Callable[[_T], _T], value: _T) -> _T:
    """The changed value. If there are branches, it stays as it is unless a row uses the change."""
    if not sampling.branches:
        return change(value)
    changed: _T = jax.lax.cond(uses, change, lambda same: same, value)
    return changed


def _shapes(sampling: Sampling, vocab_size: int) -> jax.Array | None:
    """Whether a row uses penalties or bias; None if no row can."""
    found, (penalties, bias) = [], (sampling.penalties, sampling.bias)
    if penalties is not None:
        found += [penalties.repetition_B != 1, penalties.presence_B != 0, penalties.frequency_B != 0]
    if bias is not None:
        found += [bias.ids_BM < vocab_size]
    return functools.reduce(operator.or_, [each.any() for each in found]) if found else None


def _forbids(sampling: Sampling) -> jax.Array | None:
    """Whether a row has tokens that it may not draw; None if no row can."""
    return None if sampling.allowed_BW is None else (~sampling.allowed_BW != 0).any()


def _shaped(logits_BV: jax.Array, sampling: Sampling, counts: Callable[[], jax.Array] | None) -> jax.Array:
    """The logits after penalties and bias."""
    if sampling.penalties is not None:
        assert counts is not None
        logits_BV = _penalised(logits_BV, sampling.penalties, counts())
    if sampling.bias is not None:
        row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        logits_BV = logits_BV.at[row_B1, sampling.bias.ids_BM].add(sampling.bias.values_BM, mode="drop")
    return logits_BV


def _allowed(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits, with those of tokens that may not be drawn at -inf."""
    assert sampling.allowed_BW is not None
    return jnp.where(_bits(sampling.allowed_BW, logits_BV.shape[-1]), logits_BV, -jnp.inf)


def _bits(words_BW: jax.Array, count: int) -> jax.Array:
    """The first bits of each row, as bool."""
    bits_BWb = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_BWb.reshape(len(words_BW), -1)[:, :count] != 0


def _top(
    logits_BV: jax.Array, logprobs: Callable[[jax.Array], jax.Array], sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """The most likely tokens [B, C] and their log-probabilities; zeros if no row wants any."""

    def most_likely() -> tuple[jax.Array, jax.Array]:
        ids_BC = jax.lax.top_k(logits_BV, sampling.num_top)[1].astype(jnp.int32)
        return ids_BC, logprobs(ids_BC)

    if not sampling.branches or sampling.top_B is None:
        return most_likely()
    nothing = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), jax.eval_shape(most_likely))
    top: tuple[jax.Array, jax.Array] = jax.lax.cond((sampling.top_B > 0).any(), most_likely, lambda: nothing)
    return top


def _draw(logits_BV: jax.Array, positions_B: jax.Array, temperature_B: jax.Array, sampling: Sampling) -> jax.Array:
    """A token for every row by chance. A row's largest logit must be 0."""
    logits_BV = logits_BV / jnp.maximum(temperature_B, _LEAST_TEMPERATURE)[:, None]
    truncation = sampling.truncation
    if truncation is not None:
        cuts = ((truncation.top_k_B > 0) | (truncation.top_p_B < 1) | (truncation.min_p_B > 0)).any()
        logits_BV = _if_used(cuts, sampling, lambda logits_BV: _truncated(logits_BV, truncation), logits_BV)
    keys_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        sampling.seed_B, positions_B
    )
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:]))(keys_B)
    return first_largest(noise_BV + logits_BV)  # like `jax.random.categorical`


def _truncated(logits_BV: jax.Array, truncation: Truncation) -> jax.Array:
    """The logits with excluded tokens at -inf: top-k, then top-p and min-p among the rest. The largest must be 0."""
    k_B = jnp.where(truncation.top_k_B > 0, truncation.top_k_B, logits_BV.shape[-1]).astype(jnp.float32)
    # These sums are exact up to 2^24 tokens.
    of_k_BV = _fewest(logits_BV, lambda marked_BV: marked_BV.astype(jnp.float32).sum(axis=-1) >= k_B)
    logits_BV = jnp.where(of_k_BV, logits_BV, -jnp.inf)
    likely_BV: jax.Array = jax.lax.platform_dependent(logits_BV, truncation, cpu=_likely, default=_likely_by_integers)
    return jnp.where(likely_BV, logits_BV, -jnp.inf)


def _likely(logits_BV: jax.Array, truncation: Truncation) -> jax.Array:
    """Marks the tokens that top-p and min-p keep."""
    probabilities_BV, p_B = jax.nn.softmax(logits_BV, axis=-1), _reached(truncation)
    kept_BV = _fewest(logits_BV, lambda marked_BV: jnp.where(marked_BV, probabilities_BV, 0).sum(axis=-1) >= p_B)
    least_B1 = truncation.min_p_B[:, None] * probabilities_BV.max(axis=-1, keepdims=True)
    return kept_BV & (probabilities_BV >= least_B1)


def _likely_by_integers(logits_BV: jax.Array, truncation: Truncation) -> jax.Array:
    """The same by sums whose order does not matter. A row's largest logit must be 0."""
    weights_BV, p_B = jnp.exp(logits_BV), _reached(truncation)
    total_B = _total(jnp.ones_like(weights_BV, bool), weights_BV)
    kept_BV = _fewest(logits_BV, lambda marked_BV: _total(marked_BV, weights_BV) >= p_B * total_B)
    return kept_BV & (weights_BV >= truncation.min_p_B[:, None])


def _reached(truncation: Truncation) -> jax.Array:
    """The probability that top-p wants in all.

    top_p = 1 keeps all, even if rounding lets the sum reach 1 early. A p that float32 rounds to 0 would keep no token
    at all.
    """
    return jnp.where(truncation.top_p_B < 1, jnp.maximum(truncation.top_p_B, _LEAST_P), jnp.inf)


def _total(marked_BV: jax.Array, weights_BV: jax.Array) -> jax.Array:
    """The sum of the marked weights, from 0 to 1 each, of which less than 2^-38 counts as 0.

    A weight becomes integers of 12, 13 and 13 bits, because integers add up to the same in any order. 2^18 of them, a
    large vocabulary, stay below 2^31.
    """
    rest_BV = jnp.where(marked_BV, weights_BV, 0)
    total_B, unit = jnp.zeros(len(weights_BV), jnp.float32), 1.0
    for bits in (12, 13, 13):
        rest_BV *= 2.0**bits
        digits_BV = jnp.floor(rest_BV)
        rest_BV -= digits_BV
        unit /= 2.0**bits
        total_B += digits_BV.astype(jnp.int32).sum(axis=-1).astype(jnp.float32) * unit
    return total_B


def _fewest(values_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Marks the fewest largest values that are enough, or all: `enough` says of which rows the marked ones are."""
    bits_BV = jax.lax.bitcast_convert_type(values_BV, jnp.int32)
    ordered_BV = bits_BV ^ ((bits_BV >> 31) & _INT32.max)  # integers in the order of the floats

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # low keeps enough (or is the least), high does not
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)
        enough_B = enough(ordered_BV >= middle_B[:, None])
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    # The search needs 32 halvings of the whole range of int32.
    low_B, high_B = (jnp.full(len(values_BV), bound, jnp.int32) for bound in (_INT32.min, _INT32.max))
    threshold_B, _ = jax.lax.fori_loop(0, 32, halve, (low_B, high_B))
    return ordered_BV >= threshold_B[:, None]


def _penalised(logits_BV: jax.Array, penalties: Penalties, counts_BV: jax.Array) -> jax.Array:
    repetition_B1 = penalties.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(counts_BV > 0, repeated_BV, logits_BV)
    output_count_BV = counts_BV >> 1
    logits_BV = logits_BV - penalties.presence_B[:, None] * (output_count_BV > 0)
    return logits_BV - penalties.frequency_B[:, None] * output_count_BV
