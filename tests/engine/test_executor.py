"""The executor does what plans say, and compiles nothing once it is warm."""

import jax
import numpy as np
import pytest

from gptjax.engine.executor import Executor
from gptjax.engine.request import Request, SamplingParams
from gptjax.scheduling.plan import Copy, DecodeCall, Join, Piece, Plan, PrefillCall, Row, TableEntry
from gptjax.scheduling.policy import Policy
from tests.compilations import compilations
from tests.engine.test_engine import CONFIG, MODEL, made_params

POLICY = Policy(slots=5, chunk=64, steps=3, pieces=3)
IDS = tuple(np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40).tolist())
REQUESTS = {number: Request((), 9, SamplingParams(seed=number)) for number in range(5)}


def _executor(policy=POLICY) -> Executor:
    return Executor(MODEL, made_params(), policy=policy, pages=[9], max_length=300)


def _logits(executor: Executor) -> np.ndarray:
    return np.array(executor._slots.logits_BV)


@jax.jit
def _forward(params, ids_T):
    """The logits after each of the tokens."""
    hidden_BTD, _ = MODEL.apply({"params": params}, ids_T[None], np.arange(len(ids_T), dtype=np.int32)[None])
    return MODEL.apply({"params": params}, hidden_BTD[0], method="head")


def _expected(ids: tuple[int, ...]) -> np.ndarray:
    """The logits after a text, from the model without a cache. No token sees the padding after it."""
    return np.asarray(_forward(made_params(), np.asarray([*ids, *[0] * (len(IDS) - len(ids))], np.int32)))[len(ids) - 1]


def _plan(number: int, *, joins=(), tables=(), copies=(), prefill=(), decode=None) -> Plan:
    return Plan(number, tuple(joins), tuple(tables), tuple(copies), tuple(prefill), decode)


def test_plans_do_what_the_model_does():
    """Two prompts in one call, one of them in two pieces; a copied page; given tokens, and drawn ones."""
    executor = _executor()
    joins = [Join(3, 0), Join(1, 1)]
    tables = [TableEntry(0, 3, 0, 7), TableEntry(0, 1, 0, 2)]
    call = PrefillCall(64, IDS[:20] + IDS[5:14], (Piece(3, 0, 20, 0, False), Piece(1, 20, 9, 0, True)))
    assert executor.run(_plan(1, joins=joins, tables=tables, prefill=[call]), REQUESTS) is None
    assert np.isnan(_logits(executor)[3]).all()
    np.testing.assert_allclose(_logits(executor)[1], _expected(IDS[5:14]), atol=1e-4)

    call = PrefillCall(32, IDS[20:31], (Piece(3, 0, 11, 20, True),))
    rows = (Row(1, 9, (4, 5), 0, 2), Row(3, 31, (), 1, 0))
    sampled = executor.run(_plan(2, prefill=[call], decode=DecodeCall(2, 2, rows)), REQUESTS)
    np.testing.assert_allclose(_logits(executor)[3], _expected(IDS[:31]), atol=1e-4)
    np.testing.assert_allclose(_logits(executor)[1], _expected((*IDS[5:14], 4, 5)), atol=1e-4)
    assert sampled.token_B[0, 1] == _expected(IDS[:31]).argmax()

    # Slot 0 goes on from the first 25 tokens of slot 3.
    copied = [Copy(0, 7, 4, 25)]
    call = PrefillCall(32, (8, 9), (Piece(0, 0, 2, 25, True),))
    plan = _plan(3, joins=[Join(0, 2)], tables=[TableEntry(0, 0, 0, 4)], copies=copied, prefill=[call])
    executor.run(plan, REQUESTS)
    np.testing.assert_allclose(_logits(executor)[0], _expected((*IDS[:25], 8, 9)), atol=1e-4)

    text = (*IDS[:25], 8, 9)
    sampled = executor.run(_plan(4, decode=DecodeCall(1, 3, (Row(0, 27, (), 3, 3),))), REQUESTS)
    for token in np.asarray(sampled.token_B)[:, 0].tolist():
        assert token == _expected(text).argmax()
        text = (*text, token)
    np.testing.assert_allclose(_logits(executor)[0], _expected(text), atol=1e-4)


def test_tokens_are_counted_when_a_request_joins_and_when_they_are_drawn():
    """Prompts that need not be read count as well; tokens that are given again, and padding, are not counted twice."""
    penalised = SamplingParams(seed=0, repetition_penalty=1.1)
    requests = {0: Request((3, 5, 3), 9, penalised), 1: Request((4,), 9, penalised), 2: Request((6,), 9, penalised)}
    executor = _executor()
    joins = [Join(4, 0, (7, 5, 7)), Join(2, 1), Join(0, 2)]
    tables = [TableEntry(0, slot, 0, slot + 1) for slot in (4, 2, 0)]
    call = PrefillCall(32, (4, 6), (Piece(2, 0, 1, 0, True), Piece(0, 1, 1, 0, True)))
    # Slot 4 goes on after its prompt, of which it reads nothing here, with three tokens that it had drawn.
    rows = (Row(4, 3, (7, 5, 7), 1, 3), Row(2, 1, (), 4, 3), Row(0, 1, (), 2, 1))
    plan = _plan(1, joins=joins, tables=tables, prefill=[call], decode=DecodeCall(4, 4, rows))
    token_BT = np.asarray(executor.run(plan, requests).token_B).T
    counts_BV = np.asarray(executor._slots.counts_BV)
    for slot, prompt, output in (
        (4, {3, 5}, [7, 5, 7, *token_BT[0, 3:4]]),
        (2, {4}, token_BT[1]),
        (0, {6}, token_BT[2, :2]),
    ):
        for token in range(CONFIG.vocab_size):
            assert counts_BV[slot, token] == 2 * list(output).count(token) + (token in prompt)


def test_a_slot_that_another_request_takes_has_none_of_its_pages():
    executor = _executor()
    executor.run(_plan(1, joins=[Join(2, 0)], tables=[TableEntry(0, 2, 1, 7)]), REQUESTS)
    assert executor._slots.cache.tables[0][2].tolist() == [0, 7, 0]
    executor.run(_plan(2, joins=[Join(2, 1)], tables=[TableEntry(0, 2, 0, 3)]), REQUESTS)
    assert executor._slots.cache.tables[0][2].tolist() == [3, 0, 0]


@pytest.mark.thorough
def test_nothing_is_compiled_after_warm_up():
    executor = _executor(policy=Policy(slots=3, chunk=64, steps=2, pieces=3))
    executor.warm_up()
    with compilations() as compiled:
        joins = [Join(slot, slot) for slot in range(3)]
        tables = [TableEntry(0, slot, 0, slot + 1) for slot in range(3)]
        for number, size in enumerate((32, 64, 64), 1):
            pieces = tuple(Piece(slot, slot, 1, 0, True) for slot in range(number))
            call = PrefillCall(size, IDS[:number], pieces)
            executor.run(_plan(number, joins=joins, tables=tables, prefill=[call]), REQUESTS)
        copies = [Copy(0, 0, page, 3) for page in range(1, 9)] * 2
        executor.run(_plan(4, copies=copies), REQUESTS)
        number = 5
        for size in (1, 2, 3):
            for steps in (1, 2):
                rows = tuple(Row(slot, 1, (), steps, steps) for slot in range(size))
                executor.run(_plan(number, decode=DecodeCall(size, steps, rows)), REQUESTS)
                number += 1
        executor.wait()
        assert compiled == []
