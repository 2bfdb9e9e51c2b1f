"""The engine on a small random model: slots, chunks, rows that do not affect each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPT2Config
from gptjax.engine import programs, steps
from gptjax.engine.engine import Engine
from gptjax.engine.flat_params import FlatParams
from gptjax.engine.request import Request, SamplingParams
from gptjax.engine.steps import prefill
from gptjax.models import registry
from gptjax.models.params import Params, init_params
from tests.compilations import compilations
from tests.engine.generated import generate
from tests.thinned import thinned

CONFIG = GPT2Config(
    vocab_size=101,
    context_length=300,
    width=60,
    num_layers=2,
    num_heads=5,
    mlp_width=52,
    activation="gelu_tanh",
    norm_epsilon=1e-5,
    scale_attention=True,
    scale_attention_by_layer=False,
    tied_head=True,
)
MODEL = registry.build(CONFIG)


@functools.cache  # not while tests are collected, which every process of a run does
def made_params() -> Params:
    """Ten times the usual spread: at 0.02 the logits are nearly flat and every model looks right."""
    return jax.jit(lambda key: jax.tree.map(lambda x: x * 10, init_params(MODEL, key)))(jax.random.key(0))


def _engine(batch: int = 3, max_length: int = 300) -> Engine:
    return Engine(MODEL, made_params(), batch=batch, max_length=max_length)


def _request(seed: int, length: int, max_tokens: int = 12, **params) -> Request:
    ids = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length)
    return Request(tuple(ids.tolist()), max_tokens, SamplingParams(**{"seed": seed} | params))


def _run(engine: Engine, requests: list[Request]) -> list:
    done = {}
    for number, chunk in generate(engine, requests, None):
        if chunk.completion is not None:
            done[number] = chunk.completion
    return [(c.token_ids, c.logprobs, c.finish_reason) for _, c in sorted(done.items())]


MIXED = [  # all kinds of sampling, and of prompt lengths
    _request(1, 5),
    _request(2, 150, 30, temperature=1.0),
    _request(3, 1, 7, temperature=0.7, top_k=9, top_p=0.9),
    _request(4, 280, 40, temperature=1.3, min_p=0.02),
    _request(5, 33, 3, repetition_penalty=1.4, presence_penalty=0.5),
    _request(6, 64, 20, temperature=2.0, logit_bias={7: 5.0, 3: -100.0}),
    _request(7, 300, top_logprobs=2),
]


def test_a_request_gives_the_same_bits_alone_as_among_others():
    together = _run(_engine(), MIXED)
    for request, expected in zip(MIXED, together, strict=True):
        assert _run(_engine(), [request]) == [expected]
    # In another order, so in other slots and beside others.
    assert _run(_engine(), MIXED[::-1]) == together[::-1]


def test_greedy_tokens_are_those_of_the_full_forward():
    request = _request(8, 20, 15)
    ((tokens, logprobs, _),) = _run(_engine(), [request])
    ids = [*request.prompt_ids, *tokens]
    positions_BT = jnp.arange(len(ids))[None]
    hidden_BTD, _ = MODEL.apply({"params": made_params()}, jnp.asarray([ids]), positions_BT)
    logprobs_TV = jax.nn.log_softmax(MODEL.apply({"params": made_params()}, hidden_BTD[0], method="head"))
    predicted = np.asarray(logprobs_TV)[len(request.prompt_ids) - 1 : -1]
    assert tuple(predicted.argmax(-1).tolist()) == tokens
    np.testing.assert_allclose(predicted.max(-1), logprobs, atol=1e-4)


def test_a_full_context_gives_one_token_and_ends_with_length():
    results = _run(_engine(), [_request(1, 300), _request(2, 299), _request(3, 290)])
    assert [len(tokens) for tokens, _, _ in results] == [1, 2, 11]
    assert {reason for _, _, reason in results} == {"length"}
    assert all(token >= 0 for tokens, _, _ in results for token in tokens)


def test_logits_that_are_not_finite_end_their_row_only():
    poisoned = jax.tree.map(jnp.array, made_params())
    poisoned["position_embedding"] = poisoned["position_embedding"].at[25].set(jnp.nan)
    engine = Engine(MODEL, poisoned, batch=3, max_length=300)
    requests = [_request(1, 5, 10), _request(2, 20, 40), _request(3, 26, 5)]
    results = _run(engine, requests)
    assert [reason for _, _, reason in results] == ["length", "error", "error"]
    # The logits at positions 19 (the prompt's last) to 24 are sound, and each gives a token.
    assert [len(tokens) for tokens, _, _ in results] == [10, 6, 0]
    assert results[0] == _run(_engine(), requests[:1])[0]
    # The slots that broke are sound again for the next request.
    assert _run(engine, [_request(9, 4, 6)]) == _run(_engine(), [_request(9, 4, 6)])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1023, 1024, 1025, 1536, 1537, 2048, 2049, 5000])
@pytest.mark.parametrize("largest", [64, steps.CHUNK, steps.LARGEST_CHUNK])
def test_chunks_cover_a_prompt_once_in_order(length, largest):
    cuts = steps.chunks(length, largest)
    assert sum(count for _, count, _ in cuts) == length
    assert [start for start, _, _ in cuts] == list(np.cumsum([0] + [count for _, count, _ in cuts])[:-1])
    assert all(count <= bucket <= largest and bucket & (bucket - 1) == 0 for _, count, bucket in cuts)
    assert all(bucket < 2 * max(count, 32) for _, count, bucket in cuts)  # the smallest that will do
    assert (
        len({bucket for n in range(1, 5000) for _, _, bucket in steps.chunks(n, largest)}) <= largest.bit_length() - 5
    )


def test_a_prompt_in_chunks_gives_what_it_gives_at_once(monkeypatch):
    tokens = np.asarray(_request(1, 250).prompt_ids, np.int32)
    whole = prefill(MODEL, made_params(), steps.init_state(MODEL, batch=2, max_length=300), 1, tokens)
    monkeypatch.setattr(steps, "chunks", lambda length, largest: [(0, 100, 128), (100, 64, 64), (164, 86, 128)])
    cut = prefill(MODEL, made_params(), steps.init_state(MODEL, batch=2, max_length=300), 1, tokens)
    np.testing.assert_allclose(cut.logits_BV[1], whole.logits_BV[1], atol=2e-4)
    np.testing.assert_array_equal(cut.history_BS[1, :250], tokens)
    assert cut.cache.lengths_B.tolist() == [0, 250]


@pytest.mark.parametrize(("dtype", "chunk"), [("bfloat16", steps.LARGEST_CHUNK), ("float32", steps.CHUNK)])
def test_where_there_are_kernels_for_prompts_chunks_are_larger(monkeypatch, dtype, chunk):
    model = registry.build(CONFIG, dtype=jnp.dtype(dtype))
    assert steps.chunk_of(model) == steps.CHUNK
    monkeypatch.setattr(steps.dispatch, "wanted", lambda implementation: "mosaic")
    assert steps.chunk_of(model) == chunk


def test_flat_parameters_give_what_nested_ones_give():
    flat = FlatParams.of(made_params())
    assert FlatParams.of(flat) is flat
    jax.tree.map(np.testing.assert_array_equal, flat.nested(), made_params())
    (_, _, chunk), *_ = steps.padded_chunks(np.arange(40, dtype=np.int32), steps.CHUNK)
    nested, once = (
        steps.prefill_chunk(MODEL, params, steps.init_state(MODEL, batch=1, max_length=300), chunk)
        for params in (made_params(), flat)
    )
    jax.tree.map(np.testing.assert_array_equal, once, nested)


def test_a_chunk_is_where_it_starts_what_counts_and_its_tokens():
    tokens = np.arange(1, 1061, dtype=np.int32)
    whole, rest = steps.padded_chunks(tokens, steps.CHUNK, slot=5)
    assert [whole[:2], rest[:2]] == [(0, 1024), (1024, 36)]
    np.testing.assert_array_equal(whole[2], [5, 0, 1024, *tokens[:1024]])
    np.testing.assert_array_equal(rest[2], [5, 1024, 36, *tokens[1024:], *[0] * 28])


def test_another_model_of_the_same_configuration_compiles_nothing():
    _run(_engine(), MIXED[:1])
    other = jax.tree.map(lambda leaf: leaf * 2, made_params())
    engine = Engine(registry.build(CONFIG), other, batch=3, max_length=300)
    with compilations() as compiled:
        _run(engine, MIXED[:1])
        assert compiled == []


def test_nothing_is_compiled_after_warm_up():
    engine = _engine()
    engine.warm_up()
    with compilations() as compiled:
        # Several lengths of each bucket, one request at a time and together.
        lengths, ids = [7, 140, 2, 290, 40, 50, 257], MIXED[-1].prompt_ids
        others = [dataclasses.replace(r, prompt_ids=ids[:n]) for r, n in zip(MIXED, lengths, strict=True)]
        _run(engine, others)
        for request in others:
            _run(engine, [request])
        _run(engine, [_request(1, 5, temperature=1.0, top_logprobs=3), _request(2, 9, logit_bias={1: 1.0})])
        _run(engine, MIXED[::-1])
        assert compiled == []
        jax.jit(lambda x: x * 3.5)(np.ones(3))  # the listener does hear a compilation
        assert compiled != []


@pytest.mark.parametrize("dtype", thinned(["float32", "float16", "bfloat16"], "bfloat16"))
def test_the_state_is_updated_in_place(dtype):
    model = registry.build(CONFIG, dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), made_params())
    state = steps.init_state(model, batch=8, max_length=300)
    before = [x.unsafe_buffer_pointer() for x in state.cache.k]
    arguments = model, params, state, np.zeros(8, np.int32)
    # Nothing of the size of a layer's cache is copied or converted in passing.
    temporary = steps.advance.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    others = 0 if jax.default_backend() == "cpu" else 1 << 20  # all scores, and what products work in
    assert temporary < state.cache.k[0].size * 4 + others
    after = steps.advance(*arguments)
    assert [x.unsafe_buffer_pointer() for x in after.cache.k] == before
    assert state.cache.k[0].is_deleted()


def test_closing_the_iterator_ends_its_requests():
    engine = _engine()
    chunks = generate(engine, MIXED, None)
    next(chunks)
    assert engine.room == 0
    chunks.close()
    assert engine.room == 3


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        _engine().add(_request(1, 0))


def test_rows_that_are_not_active_stay_as_they_are():
    state = steps.init_state(MODEL, batch=2, max_length=300)
    for slot in range(2):
        state = prefill(MODEL, made_params(), state, slot, np.arange(1, 9, dtype=np.int32))
    slots = programs.Slots(state.cache, state.logits_BV, jnp.zeros(state.logits_BV.shape, jnp.int32))
    before = jax.tree.map(np.array, slots)
    rows = np.asarray([[0, 8, 0, 1, 1, 0], [-1, 0, 0, 0, 0, 0]], np.int32)
    after = programs.advance(MODEL, FlatParams.of(made_params()), slots, np.asarray([5, 6], np.int32), rows)
    assert after.cache.lengths_B.tolist() == [9, 8]
    np.testing.assert_array_equal(after.logits_BV[1], before.logits_BV[1])
    np.testing.assert_array_equal(after.counts_BV[1], before.counts_BV[1])
    for layer in range(2):
        own = before.cache.table(layer)[1]
        np.testing.assert_array_equal(after.cache.k[layer][own], before.cache.k[layer][own])
        np.testing.assert_array_equal(after.cache.v[layer][own], before.cache.v[layer][own])
    assert not np.array_equal(after.logits_BV[0], before.logits_BV[0])
