"""Llama and its relatives against the float64 oracle `tests/oracles/llama_numpy.py`, on tiny random checkpoints.

Every way of running them (whole, in chunks, token by token, padded) is held to the same oracle. Each family and setting
by itself, through `convert` and the engine: `tests/oracle/test_llama_transformers.py`.
"""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import PUBLISHED, LlamaConfig, config_from_json
from gptjax.layers.rope import inv_freq
from gptjax.models import registry
from gptjax.models.params import abstract_params, num_params
from gptjax.models.stages import activations, stages
from tests.oracles import gpt2_ours, gpt_oss_ours, gpt_oss_random, llama_numpy, llama_ours, llama_random
from tests.oracles.gpt2_ours import Outputs
from tests.oracles.llama_ours import Case, make_case
from tests.thinned import thinned

# Largest deviation allowed, as a part of the largest magnitude in the array; see `tests/models/test_gpt_oss.py`.
TOLERANCE = 128 * float(jnp.finfo(jnp.float32).eps)
LENGTH = 41  # more than four windows of 9
# All settings in few models: compiling one takes seconds. A window in one layer, norms of heads, and each kind of bias.
COMBINED: dict[str, dict[str, Any]] = {
    "llama": {**llama_random.VARIANTS["llama3.1"], **llama_random.VARIANTS["llama biases"]},
    "qwen3": {**llama_random.VARIANTS["qwen3 window"], "rms_norm_eps": 0.25},
}


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=COMBINED)
def case(request) -> Case:
    return make_case(**COMBINED[request.param])


def _deviation(ours: Outputs, oracle: llama_numpy.Outputs) -> float:
    """The largest of all outputs, as a part of TOLERANCE."""
    deviations = []
    for actual, expected in zip(ours, oracle, strict=True):
        assert actual.shape == expected.shape
        deviations.append(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())
    return float(np.max(deviations)) / TOLERANCE  # np.max keeps a NaN


@pytest.mark.parametrize(
    "counts",
    thinned([None, [41], [13, 3, 25], [1] * 41], None, [13, 3, 25]),
    ids=["uncached", "whole", "chunks", "single"],
)
def test_every_way_to_run_it_agrees_with_the_oracle(case, counts):
    ids = gpt_oss_random.tokens(1, LENGTH)
    if counts is None:
        outputs = llama_ours.run_whole(case.model, case.params, ids)
    else:
        outputs = llama_ours.run_chunks(case.model, case.params, ids, counts, LENGTH)
    assert _deviation(outputs, case.oracle(ids)) <= 1


@pytest.mark.parametrize("layout", thinned(["left", "mixed"], "mixed"))
def test_padding_has_no_influence(case, layout):
    """Rows of 41, 1, 12 and no tokens among padding whose ids are out of range, in a cache full of NaN."""
    rows = [gpt_oss_random.tokens(seed, length) for seed, length in enumerate((LENGTH, 1, 12, 0), 3)]
    tokens, positions = gpt2_ours.pack(rows, 43, layout=layout)
    cache = gpt_oss_ours.filled(registry.create_cache(case.model, batch=4, max_length=128), np.nan)
    outputs, cache = gpt2_ours.run(case.model, case.params, tokens, positions, cache)
    for b in range(3):
        assert _deviation(gpt_oss_ours.row(outputs, b, positions), case.oracle(rows[b])) <= 1
    assert np.isfinite(np.asarray(outputs.final_BTD)).all()
    assert cache.lengths_B.tolist() == [LENGTH, 1, 12, 0]


def test_the_oracle_catches_a_window_that_is_one_too_wide():
    case = make_case(**COMBINED["qwen3"])
    windows = gpt_oss_ours.wider_windows(case.model.config)
    assert windows == (10, None)
    model = registry.build(dataclasses.replace(case.model.config, windows=windows))
    ids = gpt_oss_random.tokens(1, LENGTH)
    assert _deviation(llama_ours.run_whole(model, case.params, ids), case.oracle(ids)) > 1000


def test_settings_differ():
    """No two variants are so close that the tolerance could not tell them apart."""
    ids, logits = gpt_oss_random.tokens(1, LENGTH), {}
    for name, changes in llama_random.VARIANTS.items():
        checkpoint = llama_random.checkpoint(**changes)
        logits[name] = llama_numpy.forward(checkpoint.tensors, checkpoint.config, ids).logits_TV
    for one, other in itertools.combinations(logits, 2):
        difference = np.abs(logits[one] - logits[other]).max() / np.abs(logits[other]).max()
        assert difference > 8 * TOLERANCE, (one, other)


@pytest.mark.parametrize("changes", llama_random.VARIANTS.values(), ids=llama_random.VARIANTS.keys())
def test_rotary_frequencies(changes):
    raw = {**llama_random.CONFIG, **changes}
    config = config_from_json(raw)
    frequencies, factor = llama_numpy.inv_freq(raw)
    np.testing.assert_allclose(inv_freq(config.rope, config.head_width), frequencies, rtol=1e-14)
    assert config.rope.attention_factor == pytest.approx(factor, rel=1e-14)


@pytest.mark.thorough
def test_a_row_has_the_same_bits_in_any_company():
    """In bfloat16, prefilled and decoded in a batch of 3: alone, and beside rows of other lengths."""
    case = make_case(jnp.bfloat16, **COMBINED["qwen3"])
    ids = gpt_oss_random.tokens(21, 30)

    def bits(slot: int, others: list[int]) -> list[Outputs]:
        cache = registry.create_cache(case.model, batch=3, max_length=64)
        results = []
        for start, count in [(0, 17), (17, 11), (28, 1), (29, 1)]:
            parts = [gpt_oss_random.tokens(b, min(count, length)) for b, length in enumerate(others)]
            parts[slot] = ids[start : start + count]
            tokens, positions = gpt2_ours.pack(parts, 17 if count > 1 else 1, starts=cache.lengths_B.tolist())
            outputs, cache = gpt2_ours.run(case.model, case.params, tokens, positions, cache)
            results.append(gpt_oss_ours.row(outputs, slot, positions))
        return results

    alone = bits(1, [0, 0, 0])
    for company in (bits(1, [17, 0, 3]), bits(2, [5, 11, 0])):
        for one, other in zip(jax.tree.leaves(company), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_half_precision_is_as_good_as_its_digits():
    """Against the oracle on the same rounded weights; see `tests/models/test_gpt_oss.py`."""
    case = make_case(jnp.bfloat16, **llama_random.VARIANTS["qwen2 window"])
    ids = gpt_oss_random.tokens(6, LENGTH)
    outputs = llama_ours.run_chunks(case.model, case.params, ids, [13, 28], 28)
    assert outputs.logits_BTV.dtype == jnp.float32
    for actual, expected in zip(outputs, case.oracle(ids), strict=True):
        error = np.square(np.asarray(actual, np.float64) - expected).mean() / np.square(expected).mean()
        assert np.sqrt(error) < 4 * float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("name", thinned(["llama biases", "qwen3"], "qwen3"))
def test_every_stage_is_recorded(name):
    case = make_case(**llama_random.VARIANTS[name])
    ids = gpt_oss_random.tokens(1, 5)
    found = activations(case.model, case.params, ids)
    assert list(found) == stages(case.model.config)
    assert found["block_1/mlp/gate"].shape == found["block_1/mlp/activation"].shape == (5, 80)
    normed = {stage for stage in found if stage.endswith("_norm") and "/attention/" in stage}
    assert len(normed) == (4 if name == "qwen3" else 0)
    expected = case.oracle(ids).blocks_LTD[1]
    np.testing.assert_allclose(found["block_1/mlp_residual"], expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("changes", llama_random.VARIANTS.values(), ids=llama_random.VARIANTS.keys())
def test_declares_the_leaves_of_a_checkpoint(changes):
    case = make_case(jnp.bfloat16, **changes)

    def shapes(params: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}

    assert shapes(abstract_params(case.model)) == shapes(case.params)
    assert num_params(case.model) == sum(tensor.size for tensor in case.checkpoint.tensors.values())


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "llama-2-7b": 6_738_415_616,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.2-1b": 1_235_814_400,
        "smollm2-135m": 134_515_008,
        "mistral-7b": 7_241_732_096,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-0.6b": 596_049_920,
        "qwen3-8b": 8_190_735_360,
    }.items(),
)
def test_published_sizes(name, count):
    """The published numbers of parameters, of shapes only."""
    assert num_params(registry.build(PUBLISHED[name])) == count


def test_a_full_size_forward_pass():
    """Of qwen3-8b's first two layers, of shapes only, with an axis name for every dimension of every weight."""
    published = PUBLISHED["qwen3-8b"]
    assert isinstance(published, LlamaConfig)
    model = registry.build(dataclasses.replace(published, num_layers=2, windows=(None, 64)), dtype=jnp.bfloat16)
    tokens_BT = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=2, max_length=1000, chunk=256))
    params = abstract_params(model)
    outputs, after = jax.eval_shape(lambda *args: gpt2_ours.run(model, *args), params, tokens_BT, tokens_BT, cache)
    assert (outputs.final_BTD.shape, outputs.final_BTD.dtype) == ((2, 7, 4096), jnp.bfloat16)
    assert (outputs.logits_BTV.shape, outputs.logits_BTV.dtype) == ((2, 7, 151936), jnp.float32)
    assert [x.shape for x in after.k] == [(1 + 2 * 8, 8, 128, 128), (1 + 2 * 4, 8, 128, 128)]
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
    for leaf in jax.tree.leaves(boxed["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
