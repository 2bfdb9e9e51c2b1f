"""An engine on a mesh that divides its rows: what it draws, what each device has, and that no bit depends on the load.

Run by `test_on_eight_devices.py`.
"""

import functools
import random
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import config_from_json
from gptjax.engine import free_of_load, memory
from gptjax.engine.engine import Engine
from gptjax.engine.executor import Executor
from gptjax.engine.limits import MemoryLimit
from gptjax.engine.pool_sizes import pools
from gptjax.engine.pools import least_pages, pool_kinds
from gptjax.engine.request import Request, SamplingParams
from gptjax.errors import CapacityError
from gptjax.models import registry
from gptjax.models.params import Params
from gptjax.models.registry import Model
from gptjax.scheduling.plan import Copy, DecodeCall, Join, Piece, Plan, PrefillCall, Row, TableEntry
from gptjax.scheduling.policy import Policy
from gptjax.server.worker.worker import Worker
from tests.compilations import compilations
from tests.oracles import gpt_oss_ours, gpt_oss_random, llama_ours
from tests.server.worker_material import submit
from tests.shallow import shallow
from tests.sharding.on_mesh import bytes_by_device, on_mesh, placed, sizes

MAX_LENGTH, VOCAB = 290, 101  # of all models, at least
TOLERANCE = 1e-4
Given = list[tuple[int, float]]  # tokens and log-probabilities

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="run by test_on_eight_devices.py")


@functools.cache
def _whole(name: str) -> tuple[Model, Params]:
    if name == "llama":  # grouped queries
        case = llama_ours.make_case()
        return case.model, case.params
    lm = shallow(f"{name}-tales")
    return lm.model, lm.params


def _requests() -> list[Request]:
    """Some with a beginning in common, of a page and a part of one; greedy, by chance, and with penalties."""
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, VOCAB, 150).tolist()
    found = []
    for number, (shared, own) in enumerate([(0, 1), (0, 40), (0, 200), (150, 5), (150, 60), (7, 20), (140, 1), (0, 9)]):
        ids = beginning[:shared] + rng.integers(0, VOCAB, own).tolist()
        penalty = 1.3 if number % 2 else 1.0
        params = SamplingParams(seed=number, temperature=number % 3 / 2, top_p=0.9, repetition_penalty=penalty)
        found.append(Request(tuple(ids), 8, params))
    return found


REQUESTS = _requests()


def _play(engine: Engine, requests: Sequence[Request], rng: random.Random | None = None) -> list[Given]:
    """What requests are given: one after another, or in company; some pause, and are computed again."""
    given: list[Given] = [[] for _ in requests]
    waiting, running = list(range(len(requests)))[::-1], dict[int, int]()
    if rng is not None:
        rng.shuffle(waiting)
    while waiting or running:
        while waiting and (not running or (rng is not None and rng.random() < 0.5)):
            which = waiting.pop()
            running[engine.add(requests[which])] = which
        if rng is not None and len(running) > 1:
            for number in running:
                engine.hold(number, rng.random() < 0.1 and number != min(running))
        for token in engine.step():
            which = running[token.request]
            given[which].append((token.token_id, token.logprob))
            if len(given[which]) == requests[which].max_tokens:
                engine.end(token.request)
                del running[token.request]
    return given


def _bytes(engine: Engine) -> dict[jax.Device, int]:
    return bytes_by_device(engine._executor._slots)


@pytest.mark.thorough  # where rows and copies go: `test_plans_do_what_the_model_does_in_each_part`
@pytest.mark.parametrize(  # eight_devices.py has each model on each mesh, one call at a time
    ("name", "mesh"),
    [("gpt2", (8, 1, 1)), ("llama", (4, 2, 1)), ("gpt-oss", (2, 2, 2))],
)
def test_requests_get_what_one_device_gives_and_the_same_bits_in_any_company(name, mesh):
    whole, params = _whole(name)
    model, parts = placed(whole, params, sizes(*mesh))
    policy: dict[str, Any] = {"slots": 2, "chunk": 64, "pieces": 3}

    def engine(of: tuple[Model, Params], shards: int, **options: Any) -> Engine:
        rows = Policy(**policy, shards=shards, **options.pop("how", {}))
        return Engine(*of, batch=0, max_length=MAX_LENGTH, policy=rows, **options)

    expected = _play(engine((whole, params), 1), REQUESTS)
    first = engine((model, parts), mesh[0], how={"reuse": False})
    alone = _play(first, REQUESTS)
    for ours, theirs in zip(alone, expected, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        assert np.abs(np.subtract(ours, theirs)[:, 1]).max() < TOLERANCE

    need = memory.needed(model, batch=first.batch, max_length=MAX_LENGTH, policy=first.policy)
    assert set(_bytes(first).values()) == {need.cache + need.logits}
    slots = first._executor._slots
    assert slots.logits_BV.addressable_shards[0].data.shape[0] == 2 and len(slots.logits_BV) == first.batch

    least = least_pages(pool_kinds(model, max_length=MAX_LENGTH, policy=first.policy))
    crowded = engine((model, parts), mesh[0], how={"steps": 2}, pages=[count + 2 for count in least])
    assert _play(crowded, REQUESTS, random.Random(0)) == alone


def test_plans_do_what_the_model_does_in_each_part():
    """A prompt in each part; then others that go on from copies of its pages, whose numbers differ in all pools."""
    checkpoint = gpt_oss_random.checkpoint(**gpt_oss_random.TWO_LAYERS)  # one of which has a window
    whole = registry.build(config_from_json(checkpoint.config), dtype=jnp.float32)
    params = gpt_oss_ours.params(checkpoint.dense)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 32)).tolist()
    model, parts = placed(whole, params, {"data": 2})
    executor = Executor(model, parts, policy=Policy(slots=2, chunk=32, shards=2), pages=[9, 9], max_length=128)
    requests = {number: Request((), 9, SamplingParams(seed=0)) for number in range(4)}

    def run(number: int, slots: Sequence[int], pages: Sequence[int], spans: Sequence[range], **rest: Any) -> Any:
        joins = tuple(Join(slot, slot) for slot in slots)
        tables = tuple(TableEntry(pool, slots[pool // 2], 0, page) for pool, page in enumerate(pages))
        tokens = [[ids[slot // 2][at] for at in span] for slot, span in zip(slots, spans, strict=True)]
        pieces = tuple(
            Piece(slot, start, len(span), span.start, True)
            for slot, start, span in zip(slots, (0, len(tokens[0])), spans, strict=True)
        )
        call = PrefillCall(32, tuple(tokens[0] + tokens[1]), pieces)
        return executor.run(Plan(number, joins, tables, rest.get("copies", ()), (call,), rest.get("decode")), requests)

    run(1, (1, 3), (3, 4, 5, 6), (range(20), range(30)))
    copies = Copy(0, 3, 1, 17), Copy(1, 4, 2, 17), Copy(2, 5, 7, 25), Copy(3, 6, 8, 25)
    rows = Row(2, 29, (), 1, 1), Row(3, 30, (), 1, 0), Row(0, 21, (), 1, 1)
    drawn = run(2, (0, 2), (1, 2, 7, 8), (range(17, 21), range(25, 29)), copies=copies, decode=DecodeCall(2, 1, rows))
    token_B = np.asarray(drawn.token_B)

    @jax.jit
    def forward(ids_1T: np.ndarray) -> jax.Array:
        hidden_1TD, _ = whole.apply({"params": params}, ids_1T, np.arange(32, dtype=np.int32)[None])
        return whole.apply({"params": params}, hidden_1TD[0], method="head")

    for slot, length in enumerate((21, 20, 29, 30)):
        text = ids[slot // 2][:length]
        if slot != 1:
            assert token_B[slot] == np.asarray(forward(np.asarray([ids[slot // 2]])))[length - 1].argmax()
        text += [token_B[slot]] if slot in (0, 2) else []
        expected = np.asarray(forward(np.asarray([[*text, *[0] * (32 - len(text))]])))[len(text) - 1]
        np.testing.assert_allclose(np.asarray(executor._slots.logits_BV[slot]), expected, atol=TOLERANCE)


@pytest.mark.thorough
def test_prompts_and_grammars_go_to_rows_of_all_parts():
    """By `LanguageModel`: more prompts than slots of a part; each of them can only draw what its grammar allows."""
    lm = shallow("gpt2-tales", max_length=128, max_batch=3)
    mesh = on_mesh(lm, {"data": 2}, max_batch=3)
    prompts = ["Once upon a time there was", "The wolf", "A king had", "Once upon a time there lived"]
    for options in ({}, {"grammar": {"enum": ["wolf", "king", "apple"]}}):
        found, expected = (each.generate(prompts, max_tokens=8, temperature=0, **options) for each in (mesh, lm))
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert mesh._shared._engine.batch == 4  # two in each part
    alone = mesh.generate(prompts[1], max_tokens=8, temperature=0)
    again = mesh.generate(prompts, max_tokens=8, temperature=0)[1]
    assert (alone.token_ids, alone.logprobs) == (again.token_ids, again.logprobs)
    ids = lm.tokenizer.encode("The wolf was in the wood.")
    assert np.abs(mesh.logits(ids) - lm.logits(ids)).max() < TOLERANCE
    mesh.close()


@pytest.mark.thorough
def test_generations_have_their_own_number_of_rows_in_each_part(monkeypatch):
    """Where bits depend on the rows of a call: three prompts have two rows in each part, one has one."""
    monkeypatch.setattr(free_of_load, "is_free_of_load", lambda model, rows=1: False)
    lm = shallow("gpt2-tales", max_length=128)
    mesh = on_mesh(lm, {"data": 2})
    prompts = ["Once upon a time there was", "The wolf", "A king had"]
    how = {"max_tokens": 6, "temperature": 0}
    alone = [mesh.generate(each, **how) for each in (prompts, prompts[0])]
    assert mesh._shared._engine.policy.rows == "asked"
    expected = [lm.generate(each, **how) for each in (prompts, prompts[0])]
    for ours, theirs in zip((*alone[0], alone[1]), (*expected[0], expected[1]), strict=True):
        assert ours.token_ids == theirs.token_ids
    stream = mesh.stream("A fox and a hen", **how)
    next(stream)
    together = [mesh.generate(each, **how) for each in (prompts, prompts[0])]
    found, wanted = ([(each.token_ids, each.logprobs) for each in (*some[0], some[1])] for some in (together, alone))
    assert found == wanted and mesh._shared._engine.batch == 8
    assert len(list(stream)) == 5
    mesh.close()


@pytest.mark.thorough
def test_a_server_has_slots_and_cache_of_all_parts():
    lm = shallow("gpt2-tales", max_length=128)
    mesh = on_mesh(lm, {"data": 4, "tensor": 2}, max_batch=6, memory_limit=MemoryLimit(tokens=1000))
    worker = Worker(mesh, max_queue=8, chunk=64)
    worker.start()
    worker.wait_until_ready()
    assert worker.state.slots == 8 and worker._tokens == 4 * 256  # two pages in each part
    requests = [Request(request.prompt_ids[:100], 8, request.params) for request in REQUESTS]
    with compilations() as compiled:
        readers = [submit(worker, request) for request in requests]
        found = [[token for token, *_ in reader.tokens] for reader in readers if reader.wait()]
    worker.stop()
    assert not compiled
    expected = _play(Engine(lm.model, lm.params, batch=2, max_length=128, chunk=64), requests)
    assert found == [[token for token, _ in each] for each in expected]
    message = "in each of its 4 parts (data=4): give at least that many (--memory 512tokens)"
    with pytest.raises(CapacityError, match=re.escape(message)):
        pools(mesh.model, max_length=128, policy=worker._policy, limit=MemoryLimit(tokens=511))
