"""What is said if memory runs out after all, and that all of it is given back."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import psutil
import pytest

import gptjax
import gptjax.language_model
from gptjax import CapacityError, RequestError
from gptjax.engine import memory, programs, steps
from gptjax.support.units import readable
from tests.engine.memory_material import GIB, device_of, give

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."
CALLS = {
    "generate": lambda lm: lm.generate([1, 2]),
    "stream": lambda lm: next(lm.stream([1, 2])),
    "logits": lambda lm: lm.logits([1, 2]),
    "activations": lambda lm: lm.activations([1, 2]),
    "init_state": lambda lm: lm.init_state(),
    "prefill": lambda lm: lm.prefill(lm.init_state(), [1, 2]),
    "decode": lambda lm: lm.decode(lm.init_state()),
}
STEP = {
    "generate": (programs, "prefill"),
    "stream": (programs, "prefill"),
    "logits": (steps, "score_chunk"),
    "activations": (gptjax.language_model, "activations"),
    "init_state": (steps, "init_state"),
    "prefill": (steps, "prefill_chunk"),
    "decode": (steps, "advance"),
}


def _fail(monkeypatch, call: str, error: Exception) -> None:
    home, name = STEP[call]
    real = getattr(home, name)

    def step(*arguments, **named):
        if home is not programs:  # the engine tries again
            monkeypatch.setattr(home, name, real)  # the state's shapes are asked for again, to say what it needs
        raise error

    monkeypatch.setattr(home, name, step)


@pytest.mark.parametrize("call", CALLS)
def test_out_of_memory_at_run_time_says_what_to_try(lm, monkeypatch, call):
    cause = jax.errors.JaxRuntimeError(EXHAUSTED)
    need = lm.memory()
    # Enough for the weights and the state (for `activations`, which has none, for half the weights), and for no more.
    has = need.cache + need.logits if call != "activations" else -need.weights // 2
    device = dataclasses.replace(need.device, available=has)
    give(monkeypatch, device)
    _fail(monkeypatch, call, cause)
    with pytest.raises(CapacityError, match=r"needs .* try ") as raised:
        CALLS[call](lm)
    assert raised.value.__cause__ is cause
    assert f"has {readable(has + need.weights)} available" in str(raised.value)  # what it holds it may use


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: no"), ValueError("RESOURCE_EXHAUSTED")])
def test_other_errors_stay_what_they_are(lm, monkeypatch, error):
    _fail(monkeypatch, "generate", error)
    with pytest.raises(type(error)) as raised:
        lm.generate([1, 2])
    assert raised.value is error


def test_out_of_memory_though_it_should_fit(lm, monkeypatch):
    _fail(monkeypatch, "logits", jax.errors.JaxRuntimeError(EXHAUSTED))
    monkeypatch.setattr(memory, "device_memory", lambda device=None: device_of(GIB))
    with pytest.raises(CapacityError, match=r"close other models.*max_length=256"):
        lm.logits([1, 2])


def test_out_of_memory_while_loading(demo, monkeypatch):
    def load_params(*_):
        # What is there falls while weights are placed: what counts is what there was before.
        monkeypatch.setattr(memory, "device_memory", lambda device=None: device_of(7))
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    monkeypatch.setattr("gptjax.api.load_params", load_params)
    monkeypatch.setattr(memory, "device_memory", lambda device=None: device_of(GIB))
    with pytest.raises(CapacityError, match=r"ran out of memory, though .* close other models"):
        gptjax.load(demo)


def test_a_real_out_of_memory(lm):
    with pytest.raises(CapacityError, match="close other models") as raised:  # noqa: SIM117
        with memory.explained(lm.model, batch=1, max_length=512):
            # 2^48 bytes: more than there are addresses, so no system lends them to be regretted later.
            jax.block_until_ready(jnp.zeros((1 << 46,), jnp.float32))
    assert "RESOURCE_EXHAUSTED" in str(raised.value.__cause__)
    assert lm.generate([1, 2], max_tokens=2).token_ids  # and it goes on


def test_a_closed_model_says_so(demo):
    lm = gptjax.load(demo)
    state = lm.init_state(max_length=32)
    stream = lm.stream([1, 2], max_tokens=9)
    unbegun = lm.stream([1, 2], max_tokens=9)
    next(stream)
    lm.close()
    lm.close()
    calls = [
        *CALLS.values(),
        lambda lm: lm.generate("text"),
        lambda lm: lm.stream("text"),  # at the call, not at the first chunk
        lambda lm: lm.prefill(state, [1, 2]),
        lambda lm: lm.decode(state),
        lambda lm: lm.memory(),
        lambda lm: lm.params,
        lambda lm: lm.__enter__(),
        lambda lm: next(stream),
        lambda lm: next(unbegun),
    ]
    for call in calls:
        with pytest.raises(RequestError, match="this model was closed; load it again"):
            call(lm)
    assert lm.config.num_layers == 6  # what needs no weights stays
    assert lm.tokenizer.encode("text")


def test_close_frees_an_unfinished_stream_as_well(demo):
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    lm = gptjax.load(demo, max_length=64)
    stream = lm.stream([1, 2, 3], max_tokens=50)
    next(stream)
    lm.close()
    left = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in left) < 10_000, [array.shape for array in left]
    del stream


@pytest.mark.parametrize(
    ("cycles", "growth"), [(10, 60e6), pytest.param(50, 60e6, marks=pytest.mark.slow)], ids=["ten", "fifty"]
)
def test_loading_and_closing_leaks_nothing(demo, cycles, growth):
    def cycle() -> None:
        with gptjax.load(demo, max_length=64, dtype="float32") as lm:
            assert len(lm.generate([1, 2, 3], max_tokens=3).token_ids) == 3

    process = psutil.Process()
    for _ in range(2):  # compiles, and brings the allocator to its level
        cycle()
    gc.collect()
    arrays, resident = len(jax.live_arrays()), process.memory_info().rss
    for _ in range(cycles):
        cycle()
    grown = process.memory_info().rss - resident  # not collected: closing is to be enough
    assert len(jax.live_arrays()) <= arrays
    # Weights are 28 MB: ten that were kept would be 280 MB.
    assert grown < growth, f"{grown / 1e6:.1f} MB"
