"""Sampling against its definition in float64 NumPy, and against the distributions it must draw from."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.engine import sampling
from gptjax.engine.sampling import Bias, Penalties, Sampling, Truncation, output_counts, sample

V = 37


@jax.jit
def _sample(logits_BV, positions_B, settings, counts_BV=None):
    return sample(logits_BV, positions_B, settings, None if counts_BV is None else lambda: counts_BV)


def _logits(seed: int, rows: int, spread: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, V)) * spread).astype(np.float32)


def _draws(
    logits_V: np.ndarray, count: int, temperature: float, truncation: dict[str, float] | None = None
) -> np.ndarray:
    """Tokens drawn for one row of logits at `count` positions."""
    limits = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | (truncation or {})
    settings = Sampling(
        seed_B=jnp.full((count,), 11, jnp.uint32),
        temperature_B=jnp.full((count,), temperature, jnp.float32),
        truncation=None
        if truncation is None
        else Truncation(
            jnp.full((count,), limits["top_k"], jnp.int32),
            jnp.full((count,), limits["top_p"], jnp.float32),
            jnp.full((count,), limits["min_p"], jnp.float32),
        ),
    )
    logits_BV = jnp.asarray(np.tile(logits_V, (count, 1)))
    return np.asarray(_sample(logits_BV, jnp.arange(count, dtype=jnp.int32), settings).token_B)


def _probabilities(logits_V: np.ndarray, temperature: float) -> np.ndarray:
    scaled_V = logits_V.astype(np.float64) / temperature
    weights_V = np.exp(scaled_V - scaled_V.max())
    return weights_V / weights_V.sum()


def _chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """The probability of counts at least this far off, by Wilson and Hilferty's normal approximation."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits_V, count = _logits(1, 1)[0], 40_000
    counts = np.bincount(_draws(logits_V, count, temperature), minlength=V)
    p = _chi_square_p(counts, _probabilities(logits_V, temperature) * count)
    assert p > 1e-3
    # The test can tell: another temperature does not pass.
    assert _chi_square_p(counts, _probabilities(logits_V, temperature * 1.1) * count) < 1e-6


def test_temperature_zero_is_argmax_whatever_else_is_set():
    logits_BV = _logits(2, 5)
    greedy = _sample(jnp.asarray(logits_BV), jnp.arange(5), Sampling(seed_B=jnp.zeros(5, jnp.uint32)))
    mixed = _sample(
        jnp.asarray(logits_BV),
        jnp.arange(5),
        Sampling(
            seed_B=jnp.zeros(5, jnp.uint32),
            temperature_B=jnp.asarray([0, 1, 0, 1, 0], jnp.float32),
            truncation=Truncation(jnp.full(5, 3), jnp.full(5, 0.9), jnp.full(5, 0.1)),
        ),
    )
    np.testing.assert_array_equal(greedy.token_B, logits_BV.argmax(-1))
    np.testing.assert_array_equal(np.asarray(mixed.token_B)[::2], logits_BV.argmax(-1)[::2])


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_a_tiny_temperature_is_argmax_and_stays_finite(temperature):
    logits_V = _logits(3, 1, spread=50.0)[0]
    assert set(_draws(logits_V, 20, temperature)) == {logits_V.argmax()}


@pytest.mark.parametrize("top_k", [1, 2, 7, V - 1, V, 10_000])
def test_top_k_keeps_the_k_most_likely(top_k):
    logits_V = _logits(4, 1, spread=0.3)[0]
    drawn = set(_draws(logits_V, 6000, 1.0, {"top_k": top_k}))
    assert drawn == set(np.argsort(-logits_V)[:top_k])


@pytest.mark.parametrize("top_p", [1e-50, 1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(top_p):
    logits_V = _logits(5, 1)[0]
    order = np.argsort(-logits_V)
    reached = np.cumsum(_probabilities(logits_V, 1.0)[order])
    wanted = set(order[: int(np.searchsorted(reached, top_p)) + 1])
    drawn = set(_draws(logits_V, 40_000, 1.0, {"top_p": top_p}))
    assert drawn <= wanted
    # All but the rarest are seen among so many draws.
    assert {token for token in wanted if _probabilities(logits_V, 1.0)[token] > 1e-3} <= drawn


def test_top_p_of_one_keeps_all_and_applies_after_temperature_and_top_k():
    logits_V = _logits(6, 1, spread=0.1)[0]
    assert set(_draws(logits_V, 8000, 1.0, {"top_p": 1.0, "top_k": 0, "min_p": 0.0})) == set(range(V))
    # Of the 4 most likely, at temperature 2, half the mass: computed by hand in float64.
    top = np.argsort(-logits_V)[:4]
    p_of_top = _probabilities(logits_V[top], 2.0)
    keep = set(top[: int(np.searchsorted(np.cumsum(p_of_top), 0.5)) + 1])
    assert set(_draws(logits_V, 4000, 2.0, {"top_k": 4, "top_p": 0.5})) == keep


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_keeps_what_is_likely_enough_beside_the_best(min_p):
    logits_V = _logits(7, 1, spread=0.8)[0]
    p_V = _probabilities(logits_V, 1.0)
    assert set(_draws(logits_V, 30_000, 1.0, {"min_p": min_p})) == set(np.flatnonzero(p_V >= min_p * p_V.max()))


@pytest.mark.parametrize("min_p", [0.0, 0.01])
@pytest.mark.parametrize("top_p", [1e-50, 0.3, 0.9, 0.999, 1.0])
def test_top_p_by_integers_keeps_what_it_does_in_float64(top_p, min_p):
    """As a GPU does, in place of a CPU's sums of floats."""
    vocabulary = 1 << 16
    logits_BV = np.random.default_rng(5).standard_normal((3, vocabulary)).astype(np.float32)
    logits_BV *= np.float32([[0], [1], [12]])  # all alike, and with nearly everything in a few tokens
    logits_BV -= logits_BV.max(axis=1, keepdims=True)
    limits = Truncation(jnp.zeros(3, jnp.int32), jnp.full(3, top_p, jnp.float32), jnp.full(3, min_p, jnp.float32))
    kept_BV = np.asarray(jax.jit(sampling._likely_by_integers)(jnp.asarray(logits_BV), limits))
    for logits_V, kept_V in zip(logits_BV.astype(np.float64), kept_BV, strict=True):
        weights_V = np.exp(logits_V)
        least = logits_V[kept_V].min()
        np.testing.assert_array_equal(kept_V, logits_V >= least)
        share = weights_V[kept_V].sum() / weights_V.sum()
        without = weights_V[logits_V > least].sum() / weights_V.sum()
        assert min_p == 0 or np.exp(least) >= min_p * (1 - 1e-6)
        assert without < top_p * (1 + 1e-6) or top_p < 1e-30
        assert share >= top_p * (1 - 1e-6) or (weights_V[~kept_V] < min_p * (1 + 1e-6)).all()


def test_integers_add_up_to_the_same_in_any_order():
    weights_V = np.exp(-np.random.default_rng(6).exponential(8, 1 << 18)).astype(np.float32)
    orders = [np.arange(len(weights_V)), np.argsort(weights_V), np.argsort(-weights_V)]
    rows_BV = jnp.asarray(np.stack([weights_V[order] for order in orders]))
    total_B = np.asarray(sampling._total(jnp.ones_like(rows_BV, bool), rows_BV))
    np.testing.assert_array_equal(total_B, total_B[0])
    np.testing.assert_allclose(total_B[0], weights_V.sum(dtype=np.float64), rtol=1e-6)
    ones_BV = jnp.ones_like(rows_BV)
    np.testing.assert_array_equal(sampling._total(ones_BV > 0, ones_BV), len(weights_V))


def test_a_draw_depends_on_its_own_row_seed_and_position_only():
    logits_BV = _logits(8, 6)
    seeds, positions = np.asarray([3, 3, 4, 5, 3, 9], np.uint32), np.asarray([0, 1, 0, 7, 0, 2], np.int32)

    def draw(rows):
        settings = Sampling(seed_B=jnp.asarray(seeds[rows]), temperature_B=jnp.ones(len(rows), jnp.float32))
        return np.asarray(_sample(jnp.asarray(logits_BV[rows]), jnp.asarray(positions[rows]), settings).token_B)

    together = draw(np.arange(6))
    backwards = draw(np.arange(6)[::-1])
    np.testing.assert_array_equal(together, backwards[::-1])
    for row in range(6):
        np.testing.assert_array_equal(draw(np.asarray([row, row]))[0], together[row])
    # The key is fold_in(key(seed), position), as the documentation says.
    key = jax.random.fold_in(jax.random.key(5), 7)
    assert together[3] == jax.random.categorical(key, jnp.asarray(logits_BV[3]) - logits_BV[3].max())


def _bias(bias_BV: np.ndarray) -> Bias:
    ids_BM = np.tile(np.arange(bias_BV.shape[1] + 2, dtype=np.int32), (len(bias_BV), 1))  # two more are none
    values_BM = np.pad(bias_BV, ((0, 0), (0, 2)), constant_values=9.0)
    return Bias(jnp.asarray(ids_BM), jnp.asarray(values_BM))


@pytest.mark.parametrize("branches", [False, True])
def test_penalties_and_bias_against_float64(branches):
    logits_BV, history_BS = _logits(9, 3), np.random.default_rng(9).integers(0, V, (3, 16)).astype(np.int32)
    lengths, prompts = np.asarray([16, 9, 1]), np.asarray([5, 9, 0])
    repetition, presence, frequency = (
        np.asarray([1.3, 2.0, 0.7]),
        np.asarray([0.5, 1.0, -1.0]),
        np.asarray([0.2, 0.1, 3.0]),
    )
    bias_BV = _logits(10, 3)
    expected_BV = logits_BV.astype(np.float64)
    for row in range(3):
        for token in range(V):
            if token in history_BS[row, : lengths[row]]:
                x = expected_BV[row, token]
                expected_BV[row, token] = x / repetition[row] if x > 0 else x * repetition[row]
            count = int((history_BS[row, prompts[row] : lengths[row]] == token).sum())
            expected_BV[row, token] -= presence[row] * (count > 0) + frequency[row] * count
    expected_BV += bias_BV
    settings = Sampling(
        seed_B=jnp.zeros(3, jnp.uint32),
        penalties=Penalties(
            jnp.asarray(repetition, jnp.float32),
            jnp.asarray(presence, jnp.float32),
            jnp.asarray(frequency, jnp.float32),
        ),
        bias=_bias(bias_BV),
        branches=branches,
    )
    counts_BV = np.zeros((3, V), np.int32)
    for row in range(3):
        counts_BV[row, history_BS[row, : prompts[row]]] = 1
        for token in history_BS[row, prompts[row] : lengths[row]]:
            counts_BV[row, token] += 2
    sampled = _sample(jnp.asarray(logits_BV), jnp.asarray(lengths, jnp.int32), settings, jnp.asarray(counts_BV))
    np.testing.assert_array_equal(sampled.token_B, expected_BV.argmax(-1))
    # The whole distribution, not only its top: ban each winner in turn by bias and compare the order.
    order = np.argsort(-expected_BV, axis=-1)
    for place in range(1, V):
        banned_BV = bias_BV.copy()
        np.put_along_axis(banned_BV, order[:, :place], -1e9, axis=-1)
        again = dataclasses.replace(settings, bias=_bias(banned_BV))
        token_B = _sample(
            jnp.asarray(logits_BV), jnp.asarray(lengths, jnp.int32), again, jnp.asarray(counts_BV)
        ).token_B
        np.testing.assert_array_equal(token_B, order[:, place])


def test_logprobs_are_the_models_own():
    logits_BV = _logits(11, 4)
    settings = Sampling(
        seed_B=jnp.zeros(4, jnp.uint32), temperature_B=jnp.full(4, 0.3), bias=_bias(_logits(12, 4)), num_top=5
    )
    sampled = _sample(jnp.asarray(logits_BV), jnp.arange(4), settings)
    wide_BV = logits_BV.astype(np.float64)
    logprobs_BV = wide_BV - np.log(np.exp(wide_BV).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        sampled.logprob_B, np.take_along_axis(logprobs_BV, np.asarray(sampled.token_B)[:, None], -1)[:, 0], atol=1e-5
    )
    np.testing.assert_array_equal(sampled.top_ids_BC, np.argsort(-wide_BV, axis=-1)[:, :5])
    np.testing.assert_allclose(sampled.top_logprobs_BC, -np.sort(-logprobs_BV, axis=-1)[:, :5], atol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_logits_that_are_not_finite_give_minus_one_in_their_row_only(poison, temperature):
    logits_BV = _logits(13, 3)
    logits_BV[1, 20] = poison
    temperature_B = None if temperature is None else jnp.full(3, temperature)
    settings = Sampling(seed_B=jnp.zeros(3, jnp.uint32), temperature_B=temperature_B)
    token_B = np.asarray(_sample(jnp.asarray(logits_BV), jnp.arange(3), settings).token_B)
    assert token_B[1] == -1
    assert (token_B[[0, 2]] >= 0).all()


def test_of_equal_logits_the_first_is_taken():
    logits_BV = np.full((3, V), -3.0, np.float32)
    logits_BV[0, [5, 9, 36]] = 2.0
    logits_BV[1, 7:] = -np.inf
    settings = Sampling(seed_B=jnp.zeros(3, jnp.uint32))
    token_B = _sample(jnp.asarray(logits_BV), jnp.zeros(3, jnp.int32), settings).token_B
    assert token_B.tolist() == [5, 0, 0]


def test_draws_are_those_of_jax():
    count, temperature = 300, 0.7
    logits_V = _logits(4, 1)[0]
    keys_B = [jax.random.fold_in(jax.random.key(11), position) for position in range(count)]
    scaled_V = (logits_V - logits_V.max()) / np.float32(temperature)
    expected_B = [int(jax.random.categorical(key, scaled_V)) for key in keys_B]
    assert _draws(logits_V, count, temperature).tolist() == expected_B


def test_penalties_without_counts_say_so():
    ones = jnp.ones(1)
    settings = Sampling(seed_B=jnp.zeros(1, jnp.uint32), penalties=Penalties(ones, ones, ones))
    with pytest.raises(ValueError, match="counts"):
        sample(jnp.zeros((1, V)), jnp.zeros(1, jnp.int32), settings)


def test_counts_of_a_history_are_those_of_its_tokens():
    history_BS = np.random.default_rng(3).integers(0, V, (3, 50)).astype(np.int32)
    lengths = [50, 0, 17]
    counts_BV = np.asarray(output_counts(jnp.asarray(history_BS), jnp.asarray(lengths), V))
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(counts_BV[row], 2 * np.bincount(history_BS[row, :length], minlength=V))


def _mixed(rows: list[str], branches: bool) -> Sampling:
    """Rows that use the named features."""
    uses = [set(row.split()) for row in rows]

    def column(name: str, value: float, off: float, dtype: str) -> jax.Array:
        return jnp.asarray([value if name in row else off for row in uses], dtype)

    return Sampling(
        seed_B=jnp.arange(len(rows), dtype=jnp.uint32),
        temperature_B=column("draws", 0.9, 0, "float32"),
        truncation=Truncation(
            column("k", 5, 0, "int32"), column("p", 0.7, 1, "float32"), column("least", 0.2, 0, "float32")
        ),
        penalties=Penalties(
            column("repeats", 1.7, 1, "float32"),
            column("present", 2.0, 0, "float32"),
            column("often", 0.8, 0, "float32"),
        ),
        bias=Bias(column("bias", 3, V, "int32")[:, None], jnp.full((len(rows), 1), 4.0)),
        allowed_BW=jnp.tile(column("limited", 0x5A5A5A5A, 0xFFFFFFFF, "uint32")[:, None], -(-V // 32)),
        top_B=column("top", 4, 0, "int32"),
        num_top=5,
        branches=branches,
    )


@pytest.mark.parametrize(
    "rows",
    [
        ["", "", ""],
        ["draws", "", ""],
        ["", "draws k", "draws"],
        ["draws p", "", "draws least"],
        ["repeats", "draws", ""],
        ["present", "", "draws top"],
        ["limited", "", "draws"],
        ["limited draws k", "draws least", "limited often"],
        ["often draws", "bias", "draws k p least repeats present often bias top"],
    ],
)
def test_branches_skip_only_what_no_row_uses(rows):
    """The same tokens and log-probabilities; and each row's are those that it has alone."""
    logits_BV, counts_BV = _logits(20, 3), np.random.default_rng(20).integers(0, 5, (3, V)).astype(np.int32)
    positions_B = np.asarray([3, 9, 4], np.int32)
    whole, skipped = (_sample(logits_BV, positions_B, _mixed(rows, each), counts_BV) for each in (False, True))
    np.testing.assert_array_equal(whole.token_B, skipped.token_B)
    np.testing.assert_array_equal(whole.logprob_B, skipped.logprob_B)
    if any("top" in row for row in rows):
        np.testing.assert_array_equal(whole.top_ids_BC, skipped.top_ids_BC)
        np.testing.assert_array_equal(whole.top_logprobs_BC, skipped.top_logprobs_BC)
    else:
        assert not np.asarray(skipped.top_ids_BC).any()
    for row in range(3):
        alone = ["" if other != row else rows[row] for other in range(3)]
        drawn = _sample(logits_BV, positions_B, _mixed(alone, True), counts_BV)
        assert (drawn.token_B[row], drawn.logprob_B[row]) == (skipped.token_B[row], skipped.logprob_B[row])
