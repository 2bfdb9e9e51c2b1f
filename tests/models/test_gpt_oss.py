"""GPT-OSS against the float64 oracle `tests/oracles/gpt_oss_numpy.py`, on tiny random checkpoints of all layouts.

Every way of running the model (whole, in chunks, token by token, padded, beside other rows) is held to the same oracle.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import config_from_json
from gptjax.layers.cache import KVCache
from gptjax.models import registry
from gptjax.models.params import Params, num_params
from gptjax.models.registry import Model
from tests.models.gpt_oss_material import Case, make_case
from tests.oracles import gpt2_ours, gpt_oss_numpy, gpt_oss_ours, gpt_oss_random
from tests.oracles.gpt2_ours import Outputs
from tests.thinned import thinned, thorough

# Largest deviation allowed, as a part of the largest magnitude in the array. A float32 sum of F, D or N·H terms is good
# to a few eps of that, a softmax to eps times its largest score (some 30 here), an angle to eps times its position, and
# three blocks add up. Mistaking one variant for another costs eight times this or more (test_settings_differ).
FLOAT32_TOLERANCE = 128 * float(jnp.finfo(jnp.float32).eps)
LENGTH = 41  # of prompts: more than four windows of 9
# Calls over a cache have these two shapes, [4, 43] and [4, 1], whatever they hold: each costs seconds to compile.
SLOTS, WIDTH = 4, 43


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def tiny() -> Case:
    return make_case()


def _cache(
    model: Model, fill: float = 0.0, *, slots: int = SLOTS, max_length: int = 128, chunk: int | None = None
) -> KVCache:
    cache = registry.create_cache(model, batch=slots, max_length=max_length, chunk=chunk)
    return gpt_oss_ours.filled(cache, fill)


def _run_whole(model: Model, params: Params, ids: Sequence[int]) -> Outputs:
    tokens, positions = gpt2_ours.pack([ids], len(ids))
    return gpt_oss_ours.row(gpt_oss_ours.run(model, params, tokens, positions)[0], 0, positions)


def _run_chunks(
    model: Model, params: Params, ids: Sequence[int], counts: Sequence[int], cache: KVCache, width: int = WIDTH
) -> tuple[Outputs, KVCache]:
    """The first row of a cache goes on with `ids`, in chunks of `counts` tokens; those of several padded to `width`."""
    outputs, done = [], 0
    empty: list[list[int]] = [[]] * (len(cache.lengths_B) - 1)
    for count in counts:
        parts = [ids[done : done + count], *empty]
        starts = cache.lengths_B.tolist()
        tokens, positions = gpt2_ours.pack(parts, width if count > 1 else 1, starts=starts)
        chunk, cache = gpt_oss_ours.run(model, params, tokens, positions, cache)
        outputs.append(gpt_oss_ours.row(chunk, 0, positions))
        done += count
        assert cache.lengths_B.tolist() == [starts[0] + count, *starts[1:]]
    return gpt_oss_ours.join(outputs), cache


def _deviation(ours: Outputs, oracle: gpt_oss_numpy.Outputs) -> float:
    """The largest of all outputs, as a part of FLOAT32_TOLERANCE."""
    pairs = [*zip(ours.blocks_LBTD, oracle.blocks_LTD, strict=True)]
    pairs += [(ours.final_BTD, oracle.final_TD), (ours.logits_BTV, oracle.logits_TV)]
    deviations = []
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        deviations.append(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())
    return float(np.max(deviations)) / FLOAT32_TOLERANCE  # np.max keeps a NaN


def _assert_close(ours: Outputs, oracle: gpt_oss_numpy.Outputs) -> None:
    assert oracle.margin > 1e-4, "a tie between experts, which rounding may decide: take another seed"
    assert _deviation(ours, oracle) <= 1


def _assert_same_bits(ours: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert not np.isnan(np.asarray(a, np.float32)).any()


@pytest.mark.parametrize("changes", gpt_oss_random.COMBINED.values(), ids=gpt_oss_random.COMBINED.keys())
def test_every_setting_agrees_with_the_oracle(changes):
    """Each by itself: `tests/oracle/test_gpt_oss_transformers.py`."""
    case = make_case(**changes)
    ids = gpt_oss_random.tokens(1, LENGTH)
    _assert_close(_run_whole(case.model, case.params, ids), case.oracle(ids))


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max()) / FLOAT32_TOLERANCE


def _oracle_logits(**changes: Any) -> np.ndarray:
    checkpoint = gpt_oss_random.checkpoint(**changes)
    return gpt_oss_numpy.forward(checkpoint.dense, checkpoint.config, gpt_oss_random.tokens(1, LENGTH)).logits_TV


def test_settings_differ():
    """No two variants are so close that the tolerance could not tell them apart, and none of a combination is idle."""
    logits = {name: _oracle_logits(**changes) for name, changes in gpt_oss_random.VARIANTS.items()}
    for one, other in itertools.combinations(logits, 2):
        assert _difference(logits[one], logits[other]) > 8, (one, other)
    for changes in gpt_oss_random.COMBINED.values():
        combined = _oracle_logits(**changes)
        for name in changes:
            without = _oracle_logits(**{key: value for key, value in changes.items() if key != name})
            assert name == "max_position_embeddings" or _difference(without, combined) > 8, name


@pytest.mark.parametrize(
    "files",
    [
        {"layout": "packed", "spelling": "rope_scaling"},
        {"layout": "packed", "spelling": "rope_parameters", "shards": 3},
        thorough({"layout": "dequantised", "spelling": "rope_scaling", "shards": 3}),
        thorough({"layout": "dequantised", "spelling": "rope_parameters"}),
        {"layout": "original", "shards": 2},
    ],
    ids=lambda files: "-".join(str(value) for value in files.values()),
)
def test_every_layout_and_spelling_agrees_with_the_oracle(tmp_path, tiny, files):
    """Through `convert`, from a directory. Packed weights give the same bits, whatever they are called.

    Dequantised ones are the same numbers, but a product with [in, out] sums in another order than with [out, in].
    """
    model, params = gpt_oss_ours.load(gpt_oss_random.write(tmp_path, tiny.checkpoint, **files))
    ids = gpt_oss_random.tokens(1, LENGTH)
    outputs, _ = _run_chunks(model, params, ids, [LENGTH], _cache(model))
    _assert_close(outputs, tiny.oracle(ids))
    if files["layout"] != "dequantised":
        _assert_same_bits(outputs, _run_chunks(tiny.model, tiny.params, ids, [LENGTH], _cache(model))[0])
    packed = "none" if files["layout"] == "dequantised" else "experts"
    assert model.config == dataclasses.replace(tiny.model.config, mxfp4=packed)


@pytest.mark.thorough
def test_more_than_a_window_of_128():
    """The published window, across its edge: in chunks of 100, and token by token from 100 on."""
    case = make_case(sliding_window=128, **gpt_oss_random.TWO_LAYERS)
    ids = gpt_oss_random.tokens(3, 290)
    oracle = case.oracle(ids)
    cache = _cache(case.model, np.nan, slots=1, max_length=500, chunk=100)
    _assert_close(_run_chunks(case.model, case.params, ids, [100, 100, 90], cache, 100)[0], oracle)
    cache = _cache(case.model, np.nan, slots=1, max_length=500, chunk=100)
    outputs, cache = _run_chunks(case.model, case.params, ids[:140], [100, *[1] * 40], cache, 100)
    _assert_close(outputs, case.oracle(ids[:140]))
    assert cache.k[0].shape == (1 + 3, 2, 128, 16)  # what 100 tokens and the window before them touch
    assert cache.k[1].shape == (1 + 4, 2, 128, 16)


@pytest.mark.parametrize(
    "counts",
    [[41], [13, 3, 25], [9, 9, 9, 9, 5], [8, 8, 8, 8, 8, 1], [1] * 41],
    ids=["whole", "chunks", "windows", "less than windows", "token by token"],
)
def test_cached_in_any_chunks_agrees_with_the_oracle(tiny, counts):
    ids = gpt_oss_random.tokens(4, LENGTH)
    outputs, _ = _run_chunks(tiny.model, tiny.params, ids, counts, _cache(tiny.model, np.nan))
    _assert_close(outputs, tiny.oracle(ids))


def test_the_cache_holds_each_position_at_its_place(tiny):
    """Whatever the chunks, also in layers with a window; the other rows hold nothing."""
    ids = gpt_oss_random.tokens(4, LENGTH)
    whole, token_by_token = (
        _run_chunks(tiny.model, tiny.params, ids, counts, _cache(tiny.model, np.nan))[1] for counts in ([41], [1] * 41)
    )
    for a_KSH, b_KSH in zip(*(gpt2_ours.contents(cache, 0) for cache in (whole, token_by_token)), strict=True):
        atol = FLOAT32_TOLERANCE * float(np.abs(a_KSH[:, :LENGTH]).max())
        np.testing.assert_allclose(a_KSH[:, :LENGTH], b_KSH[:, :LENGTH], rtol=0, atol=atol)
        assert np.isnan(a_KSH[:, LENGTH:]).all()
    assert all(np.isnan(x_KSH).all() for row in range(1, SLOTS) for x_KSH in gpt2_ours.contents(whole, row))
    changed = [*ids[:32], (ids[32] + 1) % 101, *ids[33:]]
    other = _run_chunks(tiny.model, tiny.params, changed, [41], _cache(tiny.model, np.nan))[1]
    first, second = (gpt2_ours.contents(cache, 0)[0][:, :LENGTH] for cache in (whole, other))
    assert np.flatnonzero((first != second).any(axis=(0, 2))).tolist() == [32]


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("layout", ["left", "right", "mixed"])
def test_padding_has_no_influence(tiny, layout, cached):
    """Rows of 41, 1, 12 and no tokens among padding whose ids are out of range, in a cache full of NaN."""
    rows = [gpt_oss_random.tokens(seed, length) for seed, length in enumerate((LENGTH, 1, 12, 0), 3)]
    tokens, positions = gpt2_ours.pack(rows, WIDTH, layout=layout)
    cache = _cache(tiny.model, np.nan) if cached else None
    outputs, cache = gpt_oss_ours.run(tiny.model, tiny.params, tokens, positions, cache)
    for b in range(3):
        _assert_close(gpt_oss_ours.row(outputs, b, positions), tiny.oracle(rows[b]))
    assert np.isfinite(np.asarray(outputs.final_BTD)).all()  # at padding too: NaN there would spread in an optimiser
    if cached:
        assert cache.lengths_B.tolist() == [LENGTH, 1, 12, 0]
        for b, row in enumerate(rows):
            for array_KSH in gpt2_ours.contents(cache, b):
                assert np.isfinite(array_KSH[:, : len(row)]).all()
                assert np.isnan(array_KSH[:, len(row) :]).all(), "padding was written"


def test_decode_beside_other_rows_agrees_with_the_oracle(tiny):
    """Rows at different positions go on, a token a step, across their windows' edges; one joins late, one waits."""
    rows = [gpt_oss_random.tokens(seed, length) for seed, length in ((11, 25), (12, 12), (13, 17))]
    schedule = [(12, 0, 7)] + [(1, int(step < 12), step % 2 or int(step > 9)) for step in range(13)]
    cache, outputs, done = _cache(tiny.model, np.nan), [[], [], []], [0, 0, 0, 0]
    for counts in schedule:
        parts = [row[n : n + count] for row, n, count in zip(rows, done, counts, strict=False)]
        tokens, positions = gpt2_ours.pack([*parts, []], WIDTH if max(counts) > 1 else 1, starts=done)
        chunk, cache = gpt_oss_ours.run(tiny.model, tiny.params, tokens, positions, cache)
        for b in range(3):
            outputs[b].append(gpt_oss_ours.row(chunk, b, positions))
        done = [n + count for n, count in zip(done, (*counts, 0), strict=True)]
        assert cache.lengths_B.tolist() == done
    for row, count, chunks in zip(rows, done, outputs, strict=False):
        assert count > 9
        _assert_close(gpt_oss_ours.join(chunks), tiny.oracle(row[:count]))


def test_what_lies_beyond_a_rows_length_has_no_influence(tiny):
    """A slot used before, a slot full of NaN and a fresh one give the same bits, also with windows."""
    rows = [gpt_oss_random.tokens(3, 13), gpt_oss_random.tokens(4, 5), [], []]
    first, second = gpt2_ours.pack(rows, WIDTH), gpt2_ours.pack([[9], [8], [], []], 1, starts=[13, 5, 0, 0])
    third = gpt2_ours.pack([[4, 5], [6, 7, 8], [], []], WIDTH, starts=[14, 6, 0, 0])
    before = gpt2_ours.pack([gpt_oss_random.tokens(5, 13)] * 4, WIDTH)
    _, used = gpt_oss_ours.run(tiny.model, tiny.params, *before, _cache(tiny.model))
    used = dataclasses.replace(used, lengths_B=jnp.zeros_like(used.lengths_B))
    results = []
    for cache in (_cache(tiny.model), used, _cache(tiny.model, np.nan), _cache(tiny.model, np.inf)):
        outputs = []
        for step in (first, second, third):
            one, cache = gpt_oss_ours.run(tiny.model, tiny.params, *step, cache)
            outputs.append(one)
        results.append(outputs)
    for result in results[1:]:
        _assert_same_bits(result, results[0])


@pytest.mark.thorough
def test_a_row_has_the_same_bits_in_any_company():
    """Prefill in chunks of 64 and three steps of decoding in a batch of 5: alone, beside short and long rows.

    In bfloat16; in float32: `tests/models/test_golden_gpt_oss.py`.
    Which experts its neighbours choose, and how many tokens they have, must not change how a row's own are summed.
    """
    case = make_case(jnp.bfloat16, sliding_window=100, **gpt_oss_random.TWO_LAYERS)
    ids = gpt_oss_random.tokens(21, 150)

    def bits(slot: int, lengths: list[int], fill: float = 0.0) -> list[Outputs]:
        """What the row gives in `slot` while the other slots hold sequences that began with `lengths` tokens."""
        cache = _cache(case.model, fill, slots=5, max_length=384)

        def feed(parts: list[list[int]], length: int) -> Outputs:
            nonlocal cache
            tokens, positions = gpt2_ours.pack(parts, length, starts=cache.lengths_B.tolist())
            outputs, cache = gpt_oss_ours.run(case.model, case.params, tokens, positions, cache)
            return gpt_oss_ours.row(outputs, slot, positions)

        others = [[] if b == slot else gpt_oss_random.tokens(31 + b, length) for b, length in enumerate(lengths)]
        for start in range(0, max(lengths), 64):
            feed([other[start : start + 64] for other in others], 64)
        results = []
        for start, count in [(0, 64), (64, 64), (128, 19), (147, 1), (148, 1), (149, 1)]:
            parts = [[7] if 0 < len(other) < 370 else [] for other in others]  # the others decode, the longest waits
            parts[slot] = ids[start : start + count]
            results.append(feed(parts, 64 if start < 147 else 1))
        return results

    alone = bits(1, [0] * 5)
    _assert_same_bits(bits(1, [370, 0, 129, 200, 64], np.nan), alone)
    _assert_same_bits(bits(4, [370, 300, 129, 0, 0]), alone)


@pytest.mark.parametrize(("dtype", "cached"), [(jnp.bfloat16, True), thorough(jnp.float16, False)])
def test_half_precision_is_as_good_as_its_digits(dtype, cached):
    """Against the oracle on the same rounded weights, with every expert chosen.

    (Where a few of them are, rounding decides between those that are nearly equal, and then nothing bounds the error.)
    A block rounds the residual stream twice and what it adds to it about eight times, each eps/4 in the mean.
    """
    case = make_case(dtype, num_experts_per_tok=6, **gpt_oss_random.TWO_LAYERS)
    ids = gpt_oss_random.tokens(6, LENGTH)
    tokens, positions = gpt2_ours.pack([ids], LENGTH)
    cache = _cache(case.model, slots=1) if cached else None
    outputs, _ = gpt_oss_ours.run(case.model, case.params, tokens, positions, cache)
    assert outputs.final_BTD.dtype == dtype
    assert outputs.logits_BTV.dtype == jnp.float32
    oracle = case.oracle(ids)
    for actual, expected in [
        *zip(outputs.blocks_LBTD[:, 0], oracle.blocks_LTD, strict=True),
        (outputs.final_BTD[0], oracle.final_TD),
        (outputs.logits_BTV[0], oracle.logits_TV),
    ]:
        error = np.square(np.asarray(actual, np.float64) - expected).mean() / np.square(expected).mean()
        assert np.sqrt(error) < 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("mutation", thinned(["window", "sinks"], "sinks"))
def test_the_oracle_catches(tiny, mutation):
    """A window that is one position too wide, and sinks that take no part, in chunks over the cache.

    Without one: `tests/models/test_golden_gpt_oss.py`.
    """
    model, params = tiny.model, tiny.params
    if mutation == "window":
        windows = gpt_oss_ours.wider_windows(model.config)
        assert windows == (10, None, 10)
        model = registry.build(dataclasses.replace(model.config, windows=windows))
    else:
        params = gpt_oss_ours.without_sinks(params)
    ids = gpt_oss_random.tokens(4, LENGTH)
    oracle = tiny.oracle(ids)
    outputs, _ = _run_chunks(model, params, ids, [13, 3, 25], _cache(model))
    assert _deviation(outputs, oracle) > 1000
    # Nine tokens do not reach the edge of the window: they cannot tell.
    same = gpt_oss_numpy.Outputs(*(x if np.isscalar(x) else x[..., :9, :] for x in oracle))
    first = Outputs(outputs.blocks_LBTD[:, :9], outputs.final_BTD[:9], outputs.logits_BTV[:9])
    assert (_deviation(first, same) <= 1) == (mutation == "window")


def test_experts_stay_packed(tiny):
    """In the params, and in the shapes declared: 4.25 bits a number."""
    packed = [leaf for leaf in jax.tree.leaves(tiny.params) if leaf.dtype == jnp.uint8]
    expected = [x for name, x in tiny.checkpoint.packed.items() if x.dtype == np.uint8]
    assert sum(leaf.nbytes for leaf in packed) == sum(x.nbytes for x in expected)
    numbers = num_params(tiny.model)
    assert numbers == sum(x.size for x in tiny.checkpoint.dense.values())


def test_an_unknown_implementation_raises(tiny):
    model = registry.build(tiny.model.config, implementation="cudnn")
    with pytest.raises(ValueError, match="no implementation 'cudnn'"):
        gpt_oss_ours.run(model, tiny.params, *gpt2_ours.pack([[1]], 1))


def test_the_configs_of_the_two_spellings_are_equal():
    raw = gpt_oss_random.CONFIG
    read = [config_from_json(json.loads(json.dumps(gpt_oss_random.spelled(raw, s)))) for s in gpt_oss_random.SPELLINGS]
    assert read[0] == read[1]
