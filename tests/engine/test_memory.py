"""What is needed, what to try, and that it all is given back."""

import dataclasses
import gc
import re
import shutil

import jax
import jax.numpy as jnp
import psutil
import pytest

import gptjax
import gptjax.api
import gptjax.language_model
from gptjax import CapacityError, RequestError
from gptjax.config import PUBLISHED, GPT2Config
from gptjax.diagnostics.info import describe
from gptjax.engine import memory, pool_sizes, programs, steps
from gptjax.engine.flat_params import FlatParams
from gptjax.engine.limits import MemoryLimit
from gptjax.engine.request import Request, SamplingParams
from gptjax.engine.settings import Features, settings_of
from gptjax.models import registry
from gptjax.models.params import abstract_params, init_params, weights_by_path
from gptjax.support import runtime
from gptjax.support.runtime import DeviceMemory
from gptjax.support.units import readable
from pallas_kernels import same_bits
from pallas_kernels.pages import TILE
from tests.thinned import thorough

GIB = 1 << 30
SMALL = dataclasses.replace(
    PUBLISHED["gpt2"], vocab_size=101, context_length=70, width=96, num_layers=2, num_heads=6, mlp_width=224
)
TALES = dataclasses.replace(
    PUBLISHED["gpt2"], vocab_size=8192, context_length=512, width=256, num_layers=6, num_heads=4, mlp_width=1024
)
MIDDLE = dataclasses.replace(PUBLISHED["gpt2"], num_layers=2)  # a real width, vocabulary and context
OSS_TALES = dataclasses.replace(
    PUBLISHED["gpt-oss-20b"],
    vocab_size=8256,
    width=256,
    num_layers=6,
    windows=(128, None) * 3,
    num_heads=8,
    num_kv_heads=2,
    mlp_width=192,
    num_experts=8,
)
LLAMA_TALES = dataclasses.replace(
    PUBLISHED["qwen3-0.6b"],
    vocab_size=8192,
    context_length=512,
    width=256,
    num_layers=2,
    windows=(128, None),
    num_heads=8,
    num_kv_heads=2,
    head_width=64,
    mlp_width=704,
)
LLAMA_MIDDLE = dataclasses.replace(PUBLISHED["qwen2.5-0.5b"], num_layers=2, windows=(None,) * 2, vocab_size=5000)
# What is held in passing is one layer's; two compile in a third of the time that six take.
SHALLOW = dataclasses.replace(TALES, num_layers=2)
OSS_SHALLOW = dataclasses.replace(OSS_TALES, num_layers=2, windows=(128, None))
OSS_MIDDLE = dataclasses.replace(
    PUBLISHED["gpt-oss-20b"], num_layers=2, windows=(128, None), vocab_size=5000, num_experts=8
)


def _typed(config, kind):
    """Every matrix in a packed type of GGUF."""
    shapes = weights_by_path(abstract_params(registry.build(config)))
    paths = [path for path in shapes if path[-1].endswith(("kernel", "_embedding"))]
    return dataclasses.replace(config, types=tuple(sorted(("/".join(path), (kind,)) for path in paths)))


def _device(available: int, platform: str = "cpu") -> DeviceMemory:
    return DeviceMemory("cpu" if platform == "cpu" else "Fake GPU", platform, 2 * available, available, available)


def _has(monkeypatch, device: DeviceMemory) -> None:
    """Lets the device seem to have this memory."""
    for module in (memory, pool_sizes):
        monkeypatch.setattr(module, "device_memory", lambda device_=None: device)


def _temporary(model: registry.Model, batch: int, length: int) -> int:
    """What XLA itself says that generating holds in passing, at most: the steps' buffers."""
    params = abstract_params(model)
    state = jax.eval_shape(lambda: steps.init_state(model, batch=batch, max_length=length))
    bucket = max(b for _, _, b in steps.chunks(min(length, steps.CHUNK)))
    chunk = jax.ShapeDtypeStruct((3 + bucket,), jnp.int32)
    token_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
    drawn = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, logit_bias={1: 1.0}, seed=1)
    request = Request(prompt_ids=(1,), max_tokens=1, params=drawn)
    settings = settings_of([request] * batch, model.config.vocab_size, Features.of(drawn))
    counts_BV = jax.ShapeDtypeStruct(state.logits_BV.shape, jnp.int32)
    flat, slots = FlatParams.of(params), programs.Slots(state.cache, state.logits_BV, counts_BV)
    call = jax.ShapeDtypeStruct((bucket + 1 + 4 * -(-bucket // TILE),), jnp.int32)
    rows = jax.ShapeDtypeStruct((batch, programs.ROW_FIELDS + 1), jnp.int32)
    lowered = [
        steps.prefill_chunk.lower(model, params, state, chunk),
        steps.advance.lower(model, params, state, token_B),
        steps.sample.lower(state, settings),
        programs.prefill.lower(model, flat, slots, call, bucket, 1),
        programs.advance.lower(model, flat, slots, token_B, rows),
        programs.sample.lower(slots, rows, settings),
        programs.sample.lower(slots, rows, dataclasses.replace(settings, branches=True)),
    ]
    sizes = [each.compile().memory_analysis().temp_size_in_bytes for each in lowered]
    assert min(sizes) > 0  # the compiler tells
    return max(sizes)


@pytest.mark.parametrize(
    ("config", "batch", "length", "dtype"),
    [
        (SMALL, 1, 70, "float32"),
        thorough(SMALL, 8, 33, "bfloat16"),
        thorough(SHALLOW, 1, 512, "float32"),
        thorough(TALES, 8, 512, "bfloat16"),
        (SHALLOW, 32, 200, "float32"),  # where the logits are the most
        thorough(MIDDLE, 1, 1024, "float32"),
        thorough(MIDDLE, 1, 1024, "float16"),
        thorough(MIDDLE, 2, 1024, "bfloat16"),
        (OSS_SHALLOW, 1, 512, "float32"),
        thorough(OSS_TALES, 8, 2048, "float32"),
        thorough(OSS_SHALLOW, 2, 512, "bfloat16"),
        thorough(dataclasses.replace(OSS_SHALLOW, mxfp4="all"), 1, 512, "float32"),
        thorough(dataclasses.replace(OSS_SHALLOW, mxfp4="none"), 1, 512, "float32"),
        thorough(OSS_MIDDLE, 1, 256, "float32"),
        (LLAMA_TALES, 1, 512, "float32"),
        thorough(dataclasses.replace(LLAMA_TALES, mxfp4="linear"), 2, 512, "bfloat16"),
        thorough(LLAMA_MIDDLE, 1, 1024, "float32"),
        thorough(_typed(LLAMA_MIDDLE, "Q4_0"), 1, 128, "float32"),
        thorough(_typed(LLAMA_MIDDLE, "Q8_0"), 2, 128, "bfloat16"),
        thorough(LLAMA_MIDDLE, 2, 1024, "bfloat16"),
        thorough(OSS_MIDDLE, 1, 2048, "bfloat16"),
    ],
)
def test_activations_are_at_least_what_xla_says_and_at_most_four_times_that(config, batch, length, dtype):
    model = registry.build(config, dtype=dtype)
    estimate = memory.activations(model, batch=batch, max_length=length, platform=jax.default_backend())
    actual = _temporary(model, batch, length)
    workspaces = 0 if jax.default_backend() == "cpu" else 64 << 20
    assert actual <= estimate <= 4 * actual + workspaces, (estimate / 1e6, actual / 1e6)


@pytest.mark.parametrize(
    ("config", "dtype", "platform", "runs"),
    [
        (LLAMA_MIDDLE, "float32", "cpu", 8),  # 4864 inputs in runs of 608
        (LLAMA_MIDDLE, "bfloat16", "cpu", 0),
        (LLAMA_MIDDLE, "float32", "gpu", 0),
        (LLAMA_TALES, "float32", "cpu", 0),  # one run is not added to others
        (OSS_MIDDLE, "float32", "cpu", 0),  # of 2880 inputs, but a group of tokens at a time
    ],
)
def test_runs_of_a_product_count_where_they_are_added_up(config, dtype, platform, runs, monkeypatch):
    model = registry.build(config, dtype=dtype)
    sizes = {"batch": 1, "max_length": 512, "platform": platform}
    estimate = memory.activations(model, **sizes)
    monkeypatch.setattr(same_bits, "RUN", 1 << 20)
    assert estimate - memory.activations(model, **sizes) == 4 * 512 * config.width * runs


def test_needs_are_those_of_the_arrays_made():
    model = registry.build(SMALL, dtype="bfloat16")
    need = memory.needed(model, batch=3, max_length=70, state=True)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    state = steps.init_state(model, batch=3, max_length=70)
    assert need.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert need.cache == need.least_cache == sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert need.cache + need.logits == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert need.total == need.weights + max(need.loading, need.cache + need.logits + need.activations)


def test_loading_counts_where_it_is_the_most():
    model = registry.build(dataclasses.replace(PUBLISHED["gpt2"], num_layers=1), dtype="float32")
    need = memory.needed(model, batch=1, max_length=32, device=_device(GIB))
    assert need.loading == 2 * 4 * 50257 * 768  # the token embedding, as read and as cast
    assert need.total == need.weights + need.loading
    assert memory.needed(model, batch=1, max_length=32, device=_device(GIB, "gpu")).loading == 0


def test_a_model_tells_its_memory(demo):
    with gptjax.load(demo, max_length=100, max_batch=3, dtype="float32") as lm:
        own = lm.memory()
        assert own.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
        spare = 1 if jax.default_backend() == "cpu" else 0  # prompts may end inside a page that is copied
        assert (own.cache, own.logits) == ((1 + 3 + spare) * 128 * 6 * 2 * 256 * 4 + 3 * 2 * 4, 3 * 8 * 8192)
        other = lm.memory(batch=1, max_length=512)
        assert (
            other.cache == (1 + 4 + spare) * 128 * 6 * 2 * 256 * 4 + 5 * 4
        )  # in pages, of which the first is no row's
        assert own.device.available <= own.device.limit
        for options in ({"batch": 0}, {"batch": True}, {"max_length": 0}):
            with pytest.raises(RequestError):
                lm.memory(**options)
        with pytest.raises(CapacityError, match="513"):
            lm.memory(max_length=513)
    with gptjax.load(demo) as lm:
        assert lm.memory().cache == lm.memory(batch=1, max_length=512).cache


def _total(config: GPT2Config, dtype: str, batch: int, length: int, device: DeviceMemory) -> int:
    model = registry.build(config, dtype=dtype)
    return memory.needed(model, batch=batch, max_length=length, device=device, state=True).total


@pytest.mark.parametrize(
    ("platform", "dtype", "batch", "at", "says"),
    [
        # (what fits exactly, as dtype, batch, length) -> what is said.
        ("gpu", "float32", 4, ("bfloat16", 4, 1024), r'^dtype="bfloat16" \(--dtype bfloat16\)$'),
        ("gpu", "bfloat16", 4, ("bfloat16", 4, 640), r"^max_length=640 \(--max-length 640\)$"),
        ("cpu", "float32", 16, ("float32", 16, 640), r"^max_length=640 \(--max-length 640\)$"),
        ("cpu", "bfloat16", 4, ("bfloat16", 4, 256), r"^max_length=256 "),
        ("gpu", "float32", 4, ("bfloat16", 4, 512), r'^dtype="bfloat16" .* with max_length=512 '),
    ],
)
def test_advice_is_the_most_that_fits(platform, dtype, batch, at, says):
    config, device = PUBLISHED["gpt2"], _device(GIB, platform)
    has = _total(config, *at, device)
    model = registry.build(config, dtype=dtype)
    advice = memory.advice(model, batch=batch, max_length=1024, has=has, device=device, state=True)
    assert re.search(says, advice)
    assert memory.advice(model, batch=batch, max_length=1024, has=has - 1, device=device, state=True) != advice


def test_advice_for_fewer_rows_and_for_none_at_all():
    config, device = PUBLISHED["gpt2"], _device(GIB, "gpu")
    model = registry.build(config, dtype="bfloat16")
    # A wide batch, of which not even the shortest rows fit; so few rows do.
    has = _total(config, "bfloat16", 50, 1024, device)
    advice = memory.advice(model, batch=1000, max_length=1024, has=has, device=device, state=True)
    assert advice == "max_batch=50 (--max-batch 50)"
    none = memory.advice(model, batch=1, max_length=1024, has=1000, device=device, state=True)
    assert none == f"a device with {readable(_total(config, 'bfloat16', 1, 1024, device))} free, or a smaller model"


def test_what_was_advised_fits_and_loads(demo, monkeypatch):
    rows = {"max_batch": 8, "dtype": "float32"}
    has = memory.needed(registry.build(TALES, dtype="float32"), batch=8, max_length=384, device=_device(GIB)).least
    monkeypatch.setattr(runtime, "device_memory", lambda device=None: _device(has))
    _has(monkeypatch, _device(has))
    with pytest.raises(CapacityError, match=r"needs .* has .* available; try max_length=384 ") as raised:
        gptjax.load(demo, **rows)
    assert readable(has) in str(raised.value)
    assert describe(demo, **rows)["fits"] == f"no; {str(raised.value).partition('; ')[2]}"
    assert (
        describe(demo, max_length=384, **rows)["fits"] == "yes, with room for 384 tokens in the cache instead of 3072"
    )
    gptjax.load(demo, max_length=384, **rows).close()


def test_too_large_is_said_before_any_weight_is_read(demo, tmp_path, monkeypatch):
    shutil.copytree(demo, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"")  # reading it would be a CheckpointError
    monkeypatch.setattr(memory, "device_memory", lambda device=None: _device(10**6))
    with pytest.raises(CapacityError, match=r"has 1\.00 MB available; try a device with \d+\.\d\d MB free"):
        gptjax.load(tmp_path / "cut", dtype="float32")


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
    _has(monkeypatch, device)
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
    monkeypatch.setattr(memory, "device_memory", lambda device=None: _device(GIB))
    with pytest.raises(CapacityError, match=r"close other models.*max_length=256"):
        lm.logits([1, 2])


def test_out_of_memory_while_loading(demo, monkeypatch):
    def load_params(*_):
        # What is there falls while weights are placed: what counts is what there was before.
        monkeypatch.setattr(memory, "device_memory", lambda device=None: _device(7))
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    monkeypatch.setattr("gptjax.api.load_params", load_params)
    monkeypatch.setattr(memory, "device_memory", lambda device=None: _device(GIB))
    with pytest.raises(CapacityError, match=r"ran out of memory, though .* close other models"):
        gptjax.load(demo)


def test_a_real_out_of_memory(lm):
    with pytest.raises(CapacityError, match="close other models") as raised:  # noqa: SIM117
        with memory.explained(lm.model, batch=1, max_length=512):
            # 2^48 bytes: more than there are addresses, so no system lends them to be regretted later.
            jax.block_until_ready(jnp.zeros((1 << 46,), jnp.float32))
    assert "RESOURCE_EXHAUSTED" in str(raised.value.__cause__)
    assert lm.generate([1, 2], max_tokens=2).token_ids  # and it goes on


def test_a_state_that_cannot_fit_is_refused_before_it_is_allocated(demo, monkeypatch):
    lm, other = (gptjax.load(demo, dtype="float32") for _ in range(2))
    with pytest.raises(CapacityError, match=r"needs \d+\.\d\d TB .* try max_batch=\d+ "):
        lm.init_state(batch=10**8)  # 1.3 PB
    need = lm.memory()
    exact = dataclasses.replace(_device(need.cache + need.logits), platform=jax.default_backend())
    _has(monkeypatch, exact)
    assert len(lm.generate([1, 2], max_tokens=2).token_ids) == 2
    _has(monkeypatch, dataclasses.replace(exact, available=exact.available - 1))
    monkeypatch.setattr(steps, "init_state", None)  # it is not come to
    for call in (lambda: other.generate([1, 2]), lambda: next(other.stream([1, 2]))):
        with pytest.raises(CapacityError, match="try "):
            call()
    state = memory.needed(lm.model, batch=1, max_length=512, state=True)
    _has(monkeypatch, dataclasses.replace(exact, available=state.cache + state.logits - 1))
    for call in (other.init_state, lm.init_state):
        with pytest.raises(CapacityError, match="try "):
            call()


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


def test_advice_for_an_engine_is_the_length_that_one_row_fits():
    """All other rows share what is left, so their number hardly counts."""
    model, device = registry.build(PUBLISHED["gpt2"], dtype="bfloat16"), _device(GIB, "gpu")
    sizes = {"batch": 16, "device": device}
    has = memory.needed(model, max_length=640, **sizes).least
    assert memory.needed(model, max_length=640, **sizes).total == has + 15 * 640 * 36_864
    said = memory.shortfall(model, max_length=1024, has=has, **sizes)
    assert re.search(r"needs at least .* cache of 1 row .* try max_length=640 ", said)
    assert memory.shortfall(model, max_length=640, has=has, **sizes) is None
    assert memory.shortfall(model, max_length=640, has=has - 1, **sizes) is not None


def test_a_share_of_the_device_is_all_that_may_be_used(monkeypatch):
    model = registry.build(SMALL)
    need = memory.needed(model, batch=1, max_length=70)
    _has(monkeypatch, DeviceMemory("cpu", "cpu", 4 * need.least, 0, 4 * need.least))
    memory.check(model, batch=1, max_length=70, limit=MemoryLimit(share=0.25))
    with pytest.raises(CapacityError, match=rf"but 0.24 of the cpu has {re.escape(readable(24 * need.least // 25))}"):
        memory.check(model, batch=1, max_length=70, limit=MemoryLimit(share=0.24))
