"""How the memory that there is becomes pages, and that an engine runs with them."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax import CapacityError, CheckpointError, RequestError
from gptjax.config import PUBLISHED, GenerationDefaults
from gptjax.engine import memory, pool_sizes
from gptjax.engine.engine import Engine
from gptjax.engine.executor import Executor
from gptjax.engine.limits import MemoryLimit, memory_limit
from gptjax.engine.pools import Kind, default_policy, least_pages, most_pages, pages_in, pool_bytes, pool_kinds
from gptjax.engine.request import Request, SamplingParams
from gptjax.language_model import LanguageModel
from gptjax.models import registry
from gptjax.models.params import abstract_params, init_params
from gptjax.scheduling.policy import Policy
from gptjax.scheduling.pool import Pool
from gptjax.scheduling.scheduler import Scheduler
from gptjax.support.runtime import DeviceMemory
from tests.engine.generated import generate

OSS = registry.build(PUBLISHED["gpt-oss-20b"], dtype="bfloat16")
# Every second layer sees 8 positions.
MIXED = registry.build(
    dataclasses.replace(
        PUBLISHED["qwen3-0.6b"],
        vocab_size=101,
        context_length=2000,
        width=48,
        num_layers=2,
        windows=(8, None),
        num_heads=4,
        num_kv_heads=2,
        head_width=16,
        mlp_width=56,
    ),
    dtype="float32",
)


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (0.9, MemoryLimit(share=0.9)),
        ("0.9", MemoryLimit(share=0.9)),
        (".5", MemoryLimit(share=0.5)),
        (1, MemoryLimit(share=1.0)),
        ("262144tokens", MemoryLimit(tokens=262144)),
        ("262144 tokens", MemoryLimit(tokens=262144)),
        (None, None),
    ],
)
def test_a_share_or_a_number_of_tokens(given, limit):
    assert memory_limit(given) == limit


@pytest.mark.parametrize(
    "given", [0, 1.01, 80, "80", "90%", "-0.5", "0tokens", "1.5tokens", "8GB", "", "nan", True, []]
)
def test_other_limits_are_refused(given):
    with pytest.raises(RequestError, match=r"memory is a share .* such as 0.9, or a number of tokens"):
        memory_limit(given)


def _cost(each, pages):
    return sum(kind.page_bytes * count for kind, count in zip(each, pages, strict=True))


KINDS = [
    (Kind(None, 7, 5, 20, 20),),
    (Kind(8, 3, 2, 5, 9), Kind(None, 7, 5, 20, 20)),
    (Kind(None, 2, 6, 30, 30), Kind(8, 10, 3, 8, 12), Kind(16, 1, 4, 16, 16)),
    (Kind(8, 5, 2, 7, 11),),
    (Kind(8, 5, 2, 7, 11), Kind(16, 2, 3, 4, 4)),
]


@pytest.mark.parametrize("each", KINDS)
def test_bytes_are_divided_as_the_docstring_says(each):
    """For every number of bytes."""
    ranges = [range(1 + kind.least, 2 + kind.most) for kind in each]
    for room in range(_cost(each, least_pages(each)), _cost(each, most_pages(each)) + 20):
        pages = pages_in(each, room)
        assert all(count in counts for count, counts in zip(pages, ranges, strict=True)) and _cost(each, pages) <= room
        # Kinds that could use more have the same number, and could not all have one more.
        wanting = [count - 1 for kind, count in zip(each, pages, strict=True) if kind.least < count - 1 < kind.enough]
        assert len(set(wanting)) <= 1
        for number, kind in enumerate(each):
            if kind.window is None and pages[number] <= kind.most and wanting:
                more = [1 + max(other.least, min(wanting[0] + 1, other.enough)) for other in each]
                assert _cost(each, more) > room
    assert pages_in(each, 0) == least_pages(each)
    assert pages_in(each, 10**9) == most_pages(each)


def test_published_sizes_have_the_pages_that_a_mixed_load_needs():
    """On 80 GB less the weights, 128 slots of 131,072 tokens: all can draw, and 1.2 million tokens are in use."""
    policy = Policy(slots=128, chunk=1024, steps=8)
    each = pool_kinds(OSS, max_length=131_072, policy=policy)
    sliding, whole = pages_in(each, 40 * 10**9)
    assert sliding - 1 >= 128 * 3 and (whole - 1) * 128 > 1_200_000
    assert pool_bytes(each, (sliding, whole)) > 39.99e9


def test_layers_with_a_window_never_run_out_first():
    """Random loads: whenever there is no page for a request, the layers that see everything have none either."""
    rng, policy = np.random.default_rng(0), Policy(slots=12, chunk=256, steps=4)
    each = pool_kinds(OSS, max_length=4096, policy=policy)
    for room in (2.0, 3.0, 8.0):
        pages = pages_in(each, int(room * pool_bytes(each, least_pages(each))))
        pools = [Pool(count, kind.window) for count, kind in zip(pages, each, strict=True)]
        scheduler = Scheduler(policy, pools)
        short = {kind.window: 0 for kind in each}
        take = scheduler._allocators[0]._take

        def counted(number, pools=pools, short=short, take=take):
            page = take(number)
            if not page:
                short[pools[number].window] += 1
                assert not any(pool.free or pool.idle for pool in pools if pool.window is None)
            return page

        scheduler._allocators[0]._take = counted
        system = rng.integers(0, 9, 700).tolist()
        left = {}
        for _ in range(60):
            length = int(rng.choice([3, 100, 500, 3000]))
            prompt = (system if rng.random() < 0.5 else []) + rng.integers(0, 9, length).tolist()
            count = int(rng.integers(1, min(400, 4097 - len(prompt))))
            left[scheduler.add(prompt, count)] = count
        while left:
            plan = scheduler.plan()
            assert plan is not None, "nothing can be done"
            if plan.draws:
                tokens = [rng.integers(0, 9, row.draws).tolist() for row in plan.decode.rows]
                for drawn in scheduler.receive(plan.number, tokens):
                    left[drawn.request] -= len(drawn.tokens)
                    if not left[drawn.request]:
                        scheduler.end(drawn.request)
                        del left[drawn.request]
        assert room > 4 or short[None]


def _device(available: int, platform: str = "cpu", limit: int | None = None) -> DeviceMemory:
    return DeviceMemory("cpu" if platform == "cpu" else "GPU", platform, limit or available, 0, available)


def _has(monkeypatch, device: DeviceMemory) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device_=None: device)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("fits", [True, False])
def test_what_is_foreseen_is_what_is_made(monkeypatch, reuse, fits):
    policy = default_policy(MIXED, slots=5, chunk=256, reuse=reuse)
    need = memory.needed(MIXED, batch=5, max_length=1000, policy=policy)
    least, most = need.least_cache, need.cache
    # Half of what is free is for the pools.
    free = 2 * (most if fits else (least + most) // 2) + need.logits + need.activations
    _has(monkeypatch, _device(free + need.weights))
    cache, tokens = pool_sizes.foreseen(MIXED, batch=5, max_length=1000, policy=policy)
    _has(monkeypatch, _device(free))
    pages = pool_sizes.pools(MIXED, max_length=1000, policy=policy)
    each = pool_kinds(MIXED, max_length=1000, policy=policy)
    executor = Executor(MIXED, abstract_params(MIXED), policy=policy, pages=pages, max_length=1000)
    slots = executor._slots
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(slots.cache)) == cache
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(slots)) == cache + need.logits
    assert tokens == 128 * (pages[1] - 1 - each[1].spare)
    assert (cache == most, tokens == 5 * 1024) == (fits, fits)
    assert 0.9 * (least + most) / 2 < cache or fits


def test_a_gpus_pools_leave_room_for_the_compiler(monkeypatch):
    policy = Policy(slots=64, chunk=2048, steps=8)
    need = memory.needed(OSS, batch=64, max_length=131_072, policy=policy, device=_device(10**11, "gpu"))
    each = pool_kinds(OSS, max_length=131_072, policy=policy)
    _has(monkeypatch, _device(80 * 10**9, "gpu", limit=96 * 10**9))
    taken = _cost(each, pool_sizes.pools(OSS, max_length=131_072, policy=policy))
    room = 80e9 - need.logits - need.activations - 0.05 * 96e9
    assert room - 50e6 < taken < room
    # A share counts the weights, too: of 128 GB, of which JAX has taken three quarters.
    share = _cost(each, pool_sizes.pools(OSS, max_length=131_072, policy=policy, limit=MemoryLimit(share=0.5)))
    room = 64e9 - need.weights - need.logits - need.activations
    assert room - 50e6 < share < room


def test_a_page_to_copy_into_if_beginnings_may_end_inside_one():
    exact, other = (
        pool_kinds(OSS, max_length=1000, policy=default_policy(OSS, slots=3, chunk=256, reuse=True, exact=exact))
        for exact in (True, False)
    )
    assert [kind.least for kind in other] == [kind.least + 1 for kind in exact]
    assert [kind.most for kind in other] == [kind.most + 1 for kind in exact]


def test_a_model_says_what_its_own_engine_takes():
    """Its engine keeps what it read, with the windows of earlier prompts."""
    params = init_params(MIXED, jax.random.key(0))
    for exact in (True, False):
        lm = LanguageModel(
            MIXED,
            params,
            tokenizer=CheckpointError("none"),
            defaults=GenerationDefaults(),
            max_length=300,
            max_batch=2,
            exact=exact,
        )
        assert lm.generate([1, 2, 3], max_tokens=1).token_ids
        slots = lm._shared._engine._executor._slots
        need = lm.memory()
        assert need.cache == sum(leaf.nbytes for leaf in jax.tree.leaves(slots.cache))
        assert need.cache + need.logits == sum(leaf.nbytes for leaf in jax.tree.leaves(slots))


def test_tokens_are_exact_and_more_than_all_slots_use_is_allowed(monkeypatch):
    policy = default_policy(MIXED, slots=2, chunk=64)
    _has(monkeypatch, _device(10**9))
    for tokens, whole in ((1000, 8), (1024, 8), (1025, 9), (100_000, 782)):
        assert (
            pool_sizes.pools(
                MIXED,
                max_length=1000,
                policy=default_policy(MIXED, slots=2, chunk=64, reuse=True, exact=False),
                limit=MemoryLimit(tokens=tokens),
            )[1]
            == 1 + whole + 1
        )
        sliding, pages = pool_sizes.pools(MIXED, max_length=1000, policy=policy, limit=MemoryLimit(tokens=tokens))
        assert pages == 1 + whole and sliding <= 1 + 2 * 3
    with pytest.raises(CapacityError, match=r"896 tokens has no room .*max_length=1000.*1000tokens.*--max-length 896"):
        pool_sizes.pools(MIXED, max_length=1000, policy=policy, limit=MemoryLimit(tokens=896))
    with pytest.raises(CapacityError, match=r"of 99999999 tokens needs .* has 1.00 GB .* try memory=\"\d+tokens\""):
        pool_sizes.pools(MIXED, max_length=1000, policy=policy, limit=MemoryLimit(tokens=99_999_999))


def test_one_row_always_fits_if_it_can_and_is_refused_with_numbers_if_not(monkeypatch):
    policy = default_policy(MIXED, slots=5, chunk=256)
    need = memory.needed(MIXED, batch=5, max_length=1000, policy=policy)
    each = pool_kinds(MIXED, max_length=1000, policy=policy)
    _has(monkeypatch, _device(need.least_cache + need.logits))
    assert pool_sizes.pools(MIXED, max_length=1000, policy=policy) == least_pages(each)
    _has(monkeypatch, _device(need.least_cache + need.logits - 1))
    with pytest.raises(CapacityError, match=r"5 rows of 1000 positions .* needs at least .* has .* available; try"):
        pool_sizes.pools(MIXED, max_length=1000, policy=policy)


PENALTIES = {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.3}


@pytest.mark.thorough
def test_many_long_rows_take_turns_in_a_small_cache():
    """Six requests, of which some need the whole cache: the same bits as with room for all.

    What penalties count survives being set aside.
    """
    params = jax.jit(lambda key: jax.tree.map(lambda x: x * 10, init_params(MIXED, key)))(jax.random.key(0))
    rng = np.random.default_rng(1)
    requests = [
        Request(tuple(rng.integers(0, 101, length).tolist()), 40, SamplingParams(seed=length, **options))
        for length, options in (
            (250, PENALTIES),
            (5, PENALTIES | {"temperature": 1.3}),  # is set aside when the first one needs its third page
            (300, {"temperature": 1.0, "top_p": 0.9}),
            (340, PENALTIES | {"min_p": 0.1, "temperature": 0.8}),
            (140, {"frequency_penalty": 1.0, "logit_bias": {7: 3.0}}),
            (260, {}),
        )
    ]
    policy = dataclasses.replace(Policy.same_bits(slots=4, chunk=32), reuse=False)
    each = pool_kinds(MIXED, max_length=380, policy=policy)
    results, resumed = [], 0
    for pages in ((5, 4), most_pages(each)):  # three pages for layers that see everything
        engine = Engine(MIXED, params, batch=4, max_length=380, policy=policy, pages=pages)
        run = engine._executor.run

        def counted(plan, *more, run=run):
            nonlocal resumed
            resumed += sum(bool(join.drawn) for join in plan.joins)
            return run(plan, *more)

        engine._executor.run = counted
        done = {n: c.completion for n, c in generate(engine, requests, None) if c.completion is not None}
        results.append([(done[n].token_ids, done[n].logprobs) for n in range(6)])
        assert resumed  # with the first pools
    assert results[0] == results[1]
