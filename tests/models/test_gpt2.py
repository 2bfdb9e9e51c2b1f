"""GPT-2 against the float64 oracle `tests/oracles/gpt2_numpy.py`, on tiny random checkpoints.

Every way of running the model (whole, in chunks, token by token, padded, beside other rows) is held to the same oracle.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gptjax.config import PUBLISHED, config_from_json
from gptjax.layers.cache import KVCache
from gptjax.layers.linear import Linear
from gptjax.layers.mlp import ACTIVATIONS
from gptjax.layers.norm import LayerNorm
from gptjax.layers.residual import Residual
from gptjax.models import registry
from gptjax.models.gpt2 import GPT2
from gptjax.models.params import abstract_params, num_params
from tests.oracles import gpt2_numpy, gpt2_ours, gpt2_random
from tests.thinned import thinned, thorough

# Largest deviation allowed, as a part of the largest magnitude in the array. A float32 sum of F or D terms is good to a
# few eps of that, a softmax to eps times its largest score (up to 30 here where scores are not scaled), and three
# blocks add up: 6e-6 is seen. Mistaking one variant for another costs 2e-4 or more (test_variants_differ).
FLOAT32_TOLERANCE = 128 * float(jnp.finfo(jnp.float32).eps)


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def tiny() -> tuple[dict[str, Any], dict[str, np.ndarray], GPT2, dict[str, Any]]:
    return _load()


def _load(
    dtype: Any = jnp.float32, **changes: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray], GPT2, dict[str, Any]]:
    """Config, tensors (rounded to `dtype`), model and params."""
    config, tensors = gpt2_random.checkpoint(**changes)
    tensors = {name: np.asarray(jnp.asarray(value, dtype)) for name, value in tensors.items()}
    return config, tensors, registry.build(config_from_json(config), dtype=dtype), gpt2_ours.params(tensors, dtype)


def _cache(model: GPT2, batch: int, fill: float = 0.0) -> KVCache:
    cache = registry.create_cache(model, batch=batch, max_length=model.config.context_length)
    return dataclasses.replace(cache, **{kv: tuple(jnp.full_like(x, fill) for x in getattr(cache, kv)) for kv in "kv"})


def _row(outputs: gpt2_ours.Outputs, row: int, positions_BT: np.ndarray) -> gpt2_ours.Outputs:
    """The real positions of one row."""
    real_T = positions_BT[row] >= 0
    blocks_LBTD, final_BTD, logits_BTV = (np.asarray(x) for x in outputs)
    return gpt2_ours.Outputs(blocks_LBTD[:, row, real_T], final_BTD[row, real_T], logits_BTV[row, real_T])


def _join(chunks: list[gpt2_ours.Outputs]) -> gpt2_ours.Outputs:
    """Outputs of consecutive chunks of one row as those of the whole."""
    return gpt2_ours.Outputs(*(np.concatenate(parts, axis=-2) for parts in zip(*chunks, strict=True)))


def _assert_close(ours: gpt2_ours.Outputs, oracle: gpt2_numpy.Outputs, tolerance: float = FLOAT32_TOLERANCE) -> None:
    pairs = [(f"block {n}", *pair) for n, pair in enumerate(zip(ours.blocks_LBTD, oracle.blocks_LTD, strict=True))]
    pairs += [("final", ours.final_BTD, oracle.final_TD), ("logits", ours.logits_BTV, oracle.logits_TV)]
    for name, actual, expected in pairs:
        assert actual.shape == expected.shape
        allowed = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=allowed, err_msg=name)


def _assert_same_bits(ours: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert not np.isnan(np.asarray(a, np.float32)).any()


@pytest.mark.parametrize("name", thinned(gpt2_random.VARIANTS, "unscaled_but_by_layer", "large_epsilon", "untied"))
def test_every_variant_agrees_with_the_oracle(name):
    config, tensors, model, params = _load(**gpt2_random.VARIANTS[name])
    ids = gpt2_random.tokens(1, 29)
    outputs, cache = gpt2_ours.run(model, params, *gpt2_ours.pack([ids], 29))
    assert cache is None
    _assert_close(_row(outputs, 0, np.zeros((1, 29))), gpt2_numpy.forward(tensors, config, ids))


@pytest.mark.parametrize("name", gpt2_numpy.ACTIVATIONS)
def test_activations_are_those_of_the_oracle(name):
    ours = ACTIVATIONS[config_from_json({**gpt2_random.CONFIG, "activation_function": name}).activation]
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    np.testing.assert_allclose(ours(jnp.asarray(x)), gpt2_numpy.ACTIVATIONS[name](x.astype(np.float64)), atol=2e-6)


def test_variants_differ():
    """No two variants are so close that the tolerance could not tell them apart."""
    outputs = {}
    for name, changes in gpt2_random.VARIANTS.items():
        config, tensors = gpt2_random.checkpoint(**changes)
        outputs[name] = gpt2_numpy.forward(tensors, config, gpt2_random.tokens(1, 29)).logits_TV
    names = sorted(outputs)
    for n, one in enumerate(names):
        for other in names[:n]:
            difference = np.abs(outputs[one] - outputs[other]).max() / np.abs(outputs[other]).max()
            assert difference > 8 * FLOAT32_TOLERANCE, (one, other, difference)


@pytest.mark.parametrize("chunks", [[29], [13, 3, 13], [1] * 29], ids=["whole", "chunks", "token by token"])
def test_cached_in_any_chunks_agrees_with_the_oracle(tiny, chunks):
    config, tensors, model, params = tiny
    ids = gpt2_random.tokens(2, 29)
    cache, outputs, start = _cache(model, batch=1), [], 0
    for length in chunks:
        tokens, positions = gpt2_ours.pack([ids[start : start + length]], length, starts=[start])
        chunk, cache = gpt2_ours.run(model, params, tokens, positions, cache)
        outputs.append(_row(chunk, 0, positions))
        start += length
        assert cache.lengths_B.tolist() == [start]
    _assert_close(_join(outputs), gpt2_numpy.forward(tensors, config, ids))


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("layout", ["left", "right", "mixed"])
def test_padding_has_no_influence(tiny, layout, cached):
    """Rows of 31, 1, 12 and no tokens among padding whose ids are out of range, in a cache full of NaN."""
    config, tensors, model, params = tiny
    rows = [gpt2_random.tokens(seed, length) for seed, length in enumerate((31, 1, 12, 0))]
    tokens, positions = gpt2_ours.pack(rows, 33, layout=layout)
    outputs, cache = gpt2_ours.run(model, params, tokens, positions, _cache(model, 4, np.nan) if cached else None)
    for b in range(3):
        _assert_close(_row(outputs, b, positions), gpt2_numpy.forward(tensors, config, rows[b]))
    assert np.isfinite(np.asarray(outputs.final_BTD)).all()  # at padding too: NaN there would spread in an optimiser
    if cached:
        assert cache.lengths_B.tolist() == [31, 1, 12, 0]
        for b, row in enumerate(rows):
            for array_KSH in gpt2_ours.contents(cache, b):
                assert np.isfinite(array_KSH[:, : len(row)]).all()
                assert np.isnan(array_KSH[:, len(row) :]).all(), "padding was written"


def test_decode_beside_other_rows_agrees_with_the_oracle(tiny):
    """Rows at different positions go on a token a step; one joins late, one waits in between, one slot is unused."""
    config, tensors, model, params = tiny
    rows = [gpt2_random.tokens(seed, length) for seed, length in ((11, 25), (12, 9), (13, 17))]
    schedule = [(12, 0, 11)] + [(1, int(step < 9), step % 2) for step in range(13)]
    cache, outputs, done = _cache(model, 4, np.nan), [[], [], []], [0, 0, 0, 0]
    for counts in schedule:
        parts = [row[n : n + count] for row, n, count in zip(rows, done, counts, strict=False)]
        tokens, positions = gpt2_ours.pack([*parts, []], max(counts), starts=done)
        chunk, cache = gpt2_ours.run(model, params, tokens, positions, cache)
        for b in range(3):
            outputs[b].append(_row(chunk, b, positions))
        done = [n + count for n, count in zip(done, (*counts, 0), strict=True)]
        assert cache.lengths_B.tolist() == done
    for row, chunks in zip(rows, outputs, strict=True):
        _assert_close(_join(chunks), gpt2_numpy.forward(tensors, config, row))


def test_what_lies_beyond_a_rows_length_has_no_influence(tiny):
    """A slot used before, a slot full of NaN and a fresh one give the same bits."""
    _, _, model, params = tiny
    rows = [gpt2_random.tokens(3, 13), gpt2_random.tokens(4, 5), []]
    first, second = gpt2_ours.pack(rows, 13), gpt2_ours.pack([[9], [8], []], 1, starts=[13, 5, 0])
    _, used = gpt2_ours.run(model, params, *gpt2_ours.pack([gpt2_random.tokens(5, 13)] * 3, 13), _cache(model, 3))
    used = dataclasses.replace(used, lengths_B=jnp.zeros_like(used.lengths_B))
    results = []
    for cache in (_cache(model, 3), used, _cache(model, 3, np.nan), _cache(model, 3, np.inf)):
        one, cache = gpt2_ours.run(model, params, *first, cache)
        two, _ = gpt2_ours.run(model, params, *second, cache)
        results.append((one, two))
    for result in results[1:]:
        _assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", thinned([jnp.float32, jnp.bfloat16], jnp.bfloat16))
def test_a_row_has_the_same_bits_in_any_company(dtype):
    """Prefill in chunks of 64 and three steps of decoding in a batch of 5: alone, beside short and long rows."""
    _, _, model, params = _load(dtype, n_positions=389, n_layer=2)
    ids = gpt2_random.tokens(21, 150)

    def bits(slot: int, lengths: list[int], fill: float = 0.0) -> list[gpt2_ours.Outputs]:
        """What the row gives in `slot` while the other slots hold sequences that began with `lengths` tokens."""
        cache = _cache(model, 5, fill)

        def feed(parts: list[list[int]], length: int) -> gpt2_ours.Outputs:
            nonlocal cache
            tokens, positions = gpt2_ours.pack(parts, length, starts=cache.lengths_B.tolist())
            outputs, cache = gpt2_ours.run(model, params, tokens, positions, cache)
            return _row(outputs, slot, positions)

        others = [[] if b == slot else gpt2_random.tokens(31 + b, length) for b, length in enumerate(lengths)]
        for start in range(0, max(lengths), 64):
            feed([other[start : start + 64] for other in others], 64)
        results = []
        for start, count in [(0, 64), (64, 64), (128, 19), (147, 1), (148, 1), (149, 1)]:
            parts = [[7] if 0 < len(other) < 380 else [] for other in others]  # the others decode, the longest waits
            parts[slot] = ids[start : start + count]
            results.append(feed(parts, 64 if start < 147 else 1))
        return results

    alone = bits(1, [0] * 5)
    _assert_same_bits(bits(1, [3, 0, 1, 2, 5]), alone)
    _assert_same_bits(bits(1, [370, 0, 129, 200, 64], np.nan), alone)
    _assert_same_bits(bits(4, [370, 300, 129, 0, 0]), alone)
    _assert_same_bits(bits(0, [0, 0, 0, 0, 385], np.nan), alone)


@pytest.mark.parametrize(
    ("dtype", "cached"),
    [
        (jnp.bfloat16, True),
        thorough(jnp.bfloat16, False),
        thorough(jnp.float16, True),
        thorough(jnp.float16, False),
    ],
)
def test_half_precision_is_as_good_as_its_digits(dtype, cached):
    """Against the oracle on the same rounded weights.

    A block rounds the residual stream twice and what it adds to it about eight times, each eps/4 in the mean: over
    three blocks some 1.3 eps in quadrature; up to 1.8 is seen.
    """
    config, tensors, model, params = _load(dtype)
    ids = gpt2_random.tokens(6, 29)
    outputs, _ = gpt2_ours.run(model, params, *gpt2_ours.pack([ids], 29), _cache(model, 1) if cached else None)
    assert outputs.final_BTD.dtype == dtype
    assert outputs.logits_BTV.dtype == jnp.float32
    oracle = gpt2_numpy.forward(tensors, config, ids)
    for actual, expected in [
        *zip(outputs.blocks_LBTD[:, 0], oracle.blocks_LTD, strict=True),
        (outputs.final_BTD[0], oracle.final_TD),
        (outputs.logits_BTV[0], oracle.logits_TV),
    ]:
        error = np.square(np.asarray(actual, np.float64) - expected).mean() / np.square(expected).mean()
        assert np.sqrt(error) < 2.5 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_operation_rounds_once(dtype):
    """Products and norms are the float64 result rounded to `dtype`, but for the few that lie next to a tie.

    A second rounding, as of a sum before its bias is added or of a mean, changes a sixth of them or more.
    """
    config, tensors, model, params = _load(dtype)
    x_TD = np.asarray(jnp.asarray(np.random.default_rng(8).standard_normal((64, config["n_embd"])) + 1, dtype))
    block, exact = params["block_1"], {name: value.astype(np.float64) for name, value in tensors.items()}
    x64_TD = x_TD.astype(np.float64)
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}

    linear = Linear(3 * config["n_embd"], ("D", "QKV"), **dtypes).apply({"params": block["attention"]["qkv"]}, x_TD)
    product = x64_TD @ exact["h.1.attn.c_attn.weight"] + exact["h.1.attn.c_attn.bias"]
    variables = {"params": block["attention_norm"]}
    _, norm = LayerNorm(1e-5, **dtypes).apply(variables, Residual(x_TD[None]), method="finished")
    normed = (x64_TD - x64_TD.mean(1, keepdims=True)) / np.sqrt(x64_TD.var(1, keepdims=True) + 1e-5)
    normed = normed * exact["h.1.ln_1.weight"] + exact["h.1.ln_1.bias"]
    for actual, expected in [(linear, product), (norm[0], normed)]:
        assert actual.dtype == dtype
        assert (np.asarray(actual) == expected.astype(dtype)).mean() > 0.98
    logits = model.apply({"params": params}, x_TD, method="head")  # not rounded at all
    expected = x64_TD @ exact["wte.weight"].T
    np.testing.assert_allclose(logits, expected, rtol=0, atol=FLOAT32_TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_declares_the_leaves_of_a_checkpoint(tied):
    config, tensors = gpt2_random.checkpoint(tie_word_embeddings=tied)
    model = registry.build(config_from_json(config), dtype=jnp.bfloat16, param_dtype=jnp.float16)
    declared = traverse_util.flatten_dict(abstract_params(model), sep="/")
    assert {name: leaf.shape for name, leaf in declared.items()} == {
        gpt2_ours.target(name): value.shape for name, value in tensors.items()
    }
    assert {leaf.dtype for leaf in declared.values()} == {jnp.dtype(jnp.float16)}
    assert registry.build(model.config, dtype=jnp.bfloat16).param_dtype == jnp.bfloat16


def test_declares_an_axis_name_for_every_dimension():
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    for config in {config.with_one_layer() for config in PUBLISHED.values()}:  # all blocks are alike
        boxed = jax.eval_shape(registry.build(config).init, jax.random.key(0), tokens_BT, tokens_BT)["params"]
        for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
            assert isinstance(leaf, nn.LogicallyPartitioned)
            assert len(leaf.names) == leaf.value.ndim


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        thorough("gpt2-medium", 354_823_168),
        thorough("gpt2-large", 774_030_080),
        thorough("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_sizes(name, count):
    """The published numbers of parameters (docs/MODELS.md), and a full-size forward pass, allocating nothing."""
    model = registry.build(PUBLISHED[name], dtype=jnp.bfloat16)
    assert num_params(model) == count
    config, tokens_BT = model.config, jax.ShapeDtypeStruct((2, 7), jnp.int32)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=2, max_length=1000))
    outputs, after = jax.eval_shape(
        lambda *args: gpt2_ours.run(model, *args), abstract_params(model), tokens_BT, tokens_BT, cache
    )
    assert outputs.blocks_LBTD.shape == (config.num_layers, 2, 7, config.width)
    assert (outputs.final_BTD.shape, outputs.final_BTD.dtype) == ((2, 7, config.width), jnp.bfloat16)
    assert (outputs.logits_BTV.shape, outputs.logits_BTV.dtype) == ((2, 7, 50257), jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    assert after.k[0].shape == (1 + 2 * 8, config.num_heads, 128, 64)


def test_an_unknown_implementation_raises(tiny):
    config, _, _, params = tiny
    model = registry.build(config_from_json(config), implementation="cudnn")
    with pytest.raises(ValueError, match=r"no implementation 'cudnn' for these operands; it has .*xla"):
        gpt2_ours.run(model, params, *gpt2_ours.pack([[1]], 1))
