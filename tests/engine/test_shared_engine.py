"""One engine for all generations of a model: each gives what it gives alone, whatever else is open."""

import dataclasses
import gc
import itertools
import random
import threading
from collections.abc import Iterator

import jax
import pytest
from jax.errors import JaxRuntimeError

from gptjax.config import GenerationDefaults
from gptjax.engine import free_of_load, memory, programs, shared, steps
from gptjax.engine.output import Chunk
from gptjax.errors import CapacityError, CheckpointError, RequestError
from gptjax.language_model import LanguageModel
from gptjax.models import registry
from tests.engine.test_steps_per_dispatch import _gpt2, _gpt_oss
from tests.thinned import thorough

MAX_LENGTH, CHUNK, VOCAB = 200, 64, 101
PATIENCE = 120  # seconds


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """So that prompts have several, and pages hold whole ones."""
    monkeypatch.setattr(steps, "chunk_of", lambda model: CHUNK)


@pytest.fixture(scope="module", params=["gpt2", thorough("gpt-oss"), thorough("gpt2, rows as asked")])
def made(request):
    """A model and its weights. GPT-OSS takes minutes to compile. "As asked" is as where bits depend on the load."""
    name, _, asked = request.param.partition(", ")
    with pytest.MonkeyPatch.context() as patch:
        if asked:
            patch.setattr(free_of_load, "is_free_of_load", lambda model, rows=1: False)
        yield _gpt2() if name == "gpt2" else _gpt_oss()


@pytest.fixture
def load(made):
    def load(max_batch=None, *, exact=True) -> LanguageModel:
        model, params = made
        tokenizer = CheckpointError("there is no tokenizer")
        return LanguageModel(
            model,
            jax.tree.map(jax.numpy.array, params),  # `close` deletes them
            tokenizer=tokenizer,
            defaults=GenerationDefaults(),
            max_length=MAX_LENGTH,
            max_batch=max_batch,
            exact=exact,
        )

    return load


def _prompt(seed: int, length: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(VOCAB) for _ in range(length)]


def _options(seed: int, max_tokens: int) -> dict:
    return {"seed": seed, "temperature": 1.0, "max_tokens": max_tokens}


def _numbers(chunks: list[Chunk]) -> list[tuple[int, float]]:
    return [(chunk.token_id, chunk.logprob) for chunk in chunks]


def _rows(completions) -> list[list[tuple[int, float]]]:
    return [list(zip(each.token_ids, each.logprobs, strict=True)) for each in completions]


# Prompts of one generation: their seeds and lengths. Some begin alike, some are alike.
ASKED = {
    "one": [(1, 70)],
    "another": [(2, 9)],
    "its next turn": [(1, 150)],
    "two": [(3, 130), (1, 40)],
    "four": [(4, 20), (2, 80), (2, 9), (1, 150)],
}
TOKENS = 11


def _alone(load, max_batch) -> dict[str, list[list[tuple[int, float]]]]:
    """What each generation gives on a model of its own."""
    given = {}
    for name, asked in ASKED.items():
        lm = load(max_batch)
        prompts = [_prompt(*each) for each in asked]
        given[name] = _rows(lm.generate(prompts, **_options(7, TOKENS)))
        lm.close()
    return given


@pytest.mark.parametrize(
    ("made", "max_batch"),
    [
        *(thorough("gpt2", most) for most in (None, 1, 3)),
        thorough("gpt-oss", None),
        *(thorough("gpt2, rows as asked", most) for most in (None, 3)),
    ],
    indirect=["made"],
)
def test_each_gives_what_it_gives_alone_beside_any_others(load, max_batch, monkeypatch):
    expected = _alone(load, max_batch)
    dice = random.Random(5)
    monkeypatch.setattr(shared, "_MOST_ROWS", 4)
    for _ in range(2):
        lm = load(max_batch)
        streams: list[tuple[str, Iterator[Chunk], list]] = []
        for _ in range(40):
            action = dice.random()
            if action < 0.15:
                name = dice.choice(list(ASKED))
                prompts = [_prompt(*each) for each in ASKED[name]]
                assert _rows(lm.generate(prompts, **_options(7, TOKENS))) == expected[name]
            elif action < 0.4 or not streams:
                name = dice.choice(["one", "another", "its next turn"])
                streams.append((name, lm.stream(_prompt(*ASKED[name][0]), **_options(7, TOKENS)), []))
            elif action < 0.5:
                streams.pop(dice.randrange(len(streams)))  # and with it goes the generator
            else:
                name, stream, given = dice.choice(streams)
                given += _numbers(list(itertools.islice(stream, dice.randint(1, 5))))
                assert given == expected[name][0][: len(given)]
        for name, stream, given in streams:
            assert given + _numbers(list(stream)) == expected[name][0]
        lm.close()


def test_streams_in_turns_are_not_computed_again_and_again(load, monkeypatch):
    read = _reading(monkeypatch)
    lm = load()
    streams = [lm.stream(_prompt(n, 30), **_options(n, 20)) for n in range(3)]
    given = [_numbers(list(each)) for each in zip(*zip(*streams, strict=True), strict=True)]
    assert [len(each) for each in given] == [20, 20, 20]
    # When the second and the third begin, there is room for 1 and 2: 30 tokens, twice 30, and three times.
    assert sum(read) <= 30 + 60 + 90 + 3 * 20


def _reading(monkeypatch) -> list[int]:
    """The tokens of each prefill call, and 1 for each row of a decode call that is given a token again."""
    read: list[int] = []
    prefill, advance = programs.prefill, programs.advance

    def counted(model, params, slots, call, size, ends):
        read.append(int(call[size + ends :].reshape(4, -1)[2].sum()))
        return prefill(model, params, slots, call, size, ends)

    def advanced(model, params, slots, token_B, rows):
        read.append(int((jax.device_get(rows)[:, 2] > 0).sum()))
        return advance(model, params, slots, token_B, rows)

    monkeypatch.setattr(programs, "prefill", counted)
    monkeypatch.setattr(programs, "advance", advanced)
    return read


@pytest.mark.parametrize("max_batch", [None, 2])
def test_a_next_turn_reads_only_what_is_new_in_whole_chunks(load, max_batch, monkeypatch):
    lm, fresh = load(max_batch), load(max_batch)
    first = _prompt(1, 140)
    said = lm.generate(first, **_options(1, 9)).token_ids
    second = [*first, *said, *_prompt(2, 20)]
    expected = fresh.generate(second, **_options(2, 9))
    read = _reading(monkeypatch)
    again = lm.generate(second, **_options(2, 9))
    assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)
    assert sum(read) == len(second) - 2 * CHUNK
    read.clear()
    both = lm.generate([second, second], **_options(2, 9))
    assert [each.token_ids for each in both] == [again.token_ids] * 2 or max_batch is None
    lm.close()


def test_a_next_turn_reads_only_what_is_new_if_the_last_bits_may_differ(load, monkeypatch):
    lm, fresh = load(exact=False), load()
    first = _prompt(1, 140)
    said = lm.generate(first, temperature=0, max_tokens=9).token_ids
    second = [*first, *said, *_prompt(2, 20)]
    read = _reading(monkeypatch)
    again = lm.generate(second, temperature=0, max_tokens=9)
    assert sum(read) == 21  # the last token that was said was not fed
    expected = fresh.generate(second, temperature=0, max_tokens=9)
    assert again.token_ids == expected.token_ids
    assert again.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_tokens_come_to_any_thread(load):
    lm, expected = load(2), {}
    for number in range(5):
        fresh = load(2)
        expected[number] = _rows([fresh.generate(_prompt(number, 50), **_options(number, 25))])[0]
    begun = {number: lm.stream(_prompt(number, 50), **_options(number, 25)) for number in range(5)}
    given: dict[int, list] = {number: _numbers([next(begun[number])]) for number in (1, 3)}
    failed = []

    def consume(number: int) -> None:
        try:
            for _ in range(2):
                given.setdefault(number, []).extend(_numbers(list(begun[number])))
                whole = lm.generate(_prompt(number, 50), **_options(number, 25))
                assert _rows([whole])[0] == expected[number]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=consume, args=(number,)) for number in begun]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not failed
    assert given == expected


def test_a_stream_that_is_left_is_held_and_one_that_is_dropped_ends(load):
    lm = load()
    left = lm.stream(_prompt(1, 20), **_options(1, 100))
    next(left)
    list(lm.stream(_prompt(2, 20), **_options(2, 60)))
    (asked,) = [each for each in lm._shared._open if not each.ended]
    assert asked.held and 1 < len(asked.tokens) < 6 + 4 * lm._shared._engine.policy.steps
    del left
    gc.collect()
    assert asked.ended
    list(lm.stream(_prompt(3, 20), **_options(3, 2)))
    list(lm.stream(_prompt(3, 20), **_options(3, 2)))
    scheduler = lm._shared._engine._scheduler
    assert asked not in lm._shared._open and len(scheduler._requests) <= 1


def test_the_engine_grows_with_what_is_open_and_two_pools_are_never_there_at_once(load, monkeypatch):
    lm = load()
    gc.collect()
    weights = sum(array.nbytes for array in jax.live_arrays())
    live, sizes = [], []
    original = registry.create_pools

    def create_pools(model, *, pages, rows, max_length):
        gc.collect()
        live.append(sum(array.nbytes for array in jax.live_arrays()) - weights)
        sizes.append(rows)
        return original(model, pages=pages, rows=rows, max_length=max_length)

    monkeypatch.setattr(registry, "create_pools", create_pools)
    first, second = (lm.stream(_prompt(n, 30), **_options(n, 20)) for n in range(2))
    next(first), next(second)
    lm.generate([[1], [2]], max_tokens=2)
    assert sizes == [1, 2, 4]  # 1 + 1 + 2
    list(first), list(second)
    lm.generate([[1], [2]], max_tokens=2)
    assert sizes == [1, 2, 4]  # it is kept
    pool = sum(leaf.nbytes for leaf in jax.tree.leaves(lm._shared._engine._executor._slots.cache))
    assert max(live) < pool / 16  # less than the smallest of the three


def _has(monkeypatch, rows: int) -> None:
    """Lets the device have room for an engine of so many rows."""
    real = shared.pools

    def pools(model, *, max_length, policy, limit):
        if policy.slots > rows:
            raise CapacityError(f"{policy.slots} rows do not fit")
        return real(model, max_length=max_length, policy=policy, limit=limit)

    monkeypatch.setattr(shared, "pools", pools)


def test_what_does_not_fit_together_takes_turns_and_what_never_fits_is_refused(load, monkeypatch):
    expected = _alone(load, None)
    lm = load()
    _has(monkeypatch, 2)
    streams = [lm.stream(_prompt(*ASKED[name][0]), **_options(7, TOKENS)) for name in ("one", "another", "one")]
    given = [_numbers([next(stream)]) for stream in streams]
    for number in range(3):
        given[number] += _numbers([next(streams[number])])
    with pytest.raises(CapacityError, match="4 rows do not fit"):
        lm.generate([_prompt(*each) for each in ASKED["four"]], **_options(7, TOKENS))
    assert _rows(lm.generate([_prompt(*each) for each in ASKED["two"]], **_options(7, TOKENS))) == expected["two"]
    for number, name in enumerate(("one", "another", "one")):
        assert given[number] + _numbers(list(streams[number])) == expected[name][0]


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_an_engine_that_cannot_grow_is_kept(load, is_foreseen, monkeypatch):
    lm, made, original = load(), [], registry.create_pools

    def create_pools(model, *, pages, rows, max_length):
        made.append(rows)
        if rows > most:
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: planted")
        return original(model, pages=pages, rows=rows, max_length=max_length)

    monkeypatch.setattr(registry, "create_pools", create_pools)
    most = 2
    if is_foreseen:
        _has(monkeypatch, most)
    streams = [lm.stream(_prompt(number, 30), **_options(number, 9)) for number in range(6)]
    for stream in streams[:3]:
        next(stream)
    assert made == ([1, 2, 2] if is_foreseen else [1, 2, 4, 2])
    engine = lm._shared._engine
    for stream in streams[3:]:
        next(stream)
    assert [len(list(stream)) for stream in streams] == [8] * 6
    assert lm._shared._engine is engine
    monkeypatch.undo()  # there is memory now
    assert lm._shared.release()
    lm.generate([[1], [2], [3]], max_tokens=2)
    assert lm._shared._engine.batch == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("planted"), JaxRuntimeError("INTERNAL: planted")])
@pytest.mark.parametrize("name", ["prefill", "sample", "advance"])
def test_an_error_ends_the_one_that_it_came_to_and_the_others_go_on(load, error, name, monkeypatch):
    expected = _alone(load, None)
    lm = load()
    first = lm.stream(_prompt(*ASKED["its next turn"][0]), **_options(7, TOKENS))
    given = _numbers([next(first) for _ in range(3)])
    real = getattr(programs, name)

    def failing(*arguments):
        for leaf in jax.tree.leaves([each for each in arguments if isinstance(each, programs.Slots)]):
            leaf.delete()
        raise error

    monkeypatch.setattr(programs, name, failing)
    with pytest.raises(type(error)) as raised:
        lm.generate(_prompt(*ASKED["one"][0]), **_options(7, TOKENS))
    assert raised.value is error
    monkeypatch.setattr(programs, name, real)
    assert given + _numbers(list(first)) == expected["its next turn"][0]
    assert _rows([lm.generate(_prompt(*ASKED["one"][0]), **_options(7, TOKENS))]) == expected["one"]


def test_a_failure_of_the_device_is_not_noticed(load, monkeypatch):
    expected = _alone(load, None)["one"]
    lm, real, calls = load(), programs.advance, itertools.count()

    def failing(model, params, slots, *others):
        if next(calls) in (3, 11):
            jax.tree.map(lambda leaf: leaf.delete(), slots)
            raise JaxRuntimeError("INTERNAL: planted")
        return real(model, params, slots, *others)

    monkeypatch.setattr(programs, "advance", failing)
    assert _rows([lm.generate(_prompt(*ASKED["one"][0]), **_options(7, TOKENS))]) == expected


def test_a_model_may_be_closed_while_another_thread_generates(load):
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    lm = load()
    begun, raised = threading.Event(), []

    def consume() -> None:
        try:
            for _ in lm.stream(_prompt(1, 20), **_options(1, 150), ignore_eos=True):
                begun.set()
        except RequestError as error:
            raised.append(str(error))

    thread = threading.Thread(target=consume)
    thread.start()
    assert begun.wait(PATIENCE)
    lm.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert raised == ["this model was closed; load it again"]
    gc.collect()
    left = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in left) < 10_000


def test_an_idle_engine_makes_room_for_a_state_and_a_busy_one_does_not(load, monkeypatch):
    lm = load()
    lm.generate([1, 2], max_tokens=2)
    need = memory.needed(lm.model, batch=1, max_length=MAX_LENGTH, state=True)

    def device_memory(device=None):
        idle = lm._shared._engine is None
        return dataclasses.replace(need.device, available=need.total - need.weights if idle else 0)

    monkeypatch.setattr(memory, "device_memory", device_memory)
    stream = lm.stream([3, 4], max_tokens=9)
    next(stream)
    for call in (lm.init_state, lambda: lm.logits([1, 2])):
        with pytest.raises(CapacityError):
            call()
    stream.close()
    lm.init_state()
    assert lm._shared._engine is None


def test_a_model_that_is_dropped_frees_its_engine(load):
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    lm = load()
    stream = lm.stream([1, 2, 3], max_tokens=50)
    next(stream)
    del lm, stream  # no cycle holds them
    left = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in left) < 10_000
