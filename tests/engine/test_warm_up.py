"""`warm_up` compiles few programs, and then no request waits for another one."""

import dataclasses

from gptjax.engine.engine import Engine
from gptjax.engine.request import Request
from gptjax.scheduling.policy import Policy
from tests.compilations import compilations
from tests.engine.test_engine import MIXED, MODEL, made_params

EVERY = {
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {3: 1.0, 8: -2.0},
    "top_logprobs": 4,
}


def _run(engine: Engine, requests: list[Request]) -> None:
    """Adds a request with every step, and runs all to their ends."""
    left, waiting = {}, list(requests)
    while left or waiting:
        if waiting:
            request = waiting.pop()
            left[engine.add(request)] = request.room(engine.max_length)
        for token in engine.step():
            left[token.request] -= 1
            if not left[token.request]:
                engine.end(token.request)
                del left[token.request]


def test_no_request_waits_for_a_compilation():
    """All features alone and together, in every number of rows, from shared pages, and after being set aside."""
    policy = Policy(slots=3, chunk=64, pieces=2)
    engine = Engine(MODEL, made_params(), batch=3, max_length=300, policy=policy, pages=(5,))
    with compilations() as compiled:
        engine.warm_up()
    # Two sizes of calls; one or two prompts that end in one; steps and draws of 1, 2 and 3 rows; copies; counts; and
    # the marker that says how far the device is.
    assert len(compiled) == 2 + 2 + 2 * 3 + 3
    alone = [
        dataclasses.replace(MIXED[0], params=dataclasses.replace(MIXED[0].params, **{name: value}))
        for name, value in EVERY.items()
    ]
    every = [dataclasses.replace(each, params=dataclasses.replace(each.params, **EVERY)) for each in MIXED]
    long = [dataclasses.replace(MIXED[1], max_tokens=150)] * 4
    with compilations() as compiled:
        for requests in ([alone[0]], alone[::-1], MIXED, every, [*alone, *every, *MIXED], long, MIXED[::-1]):
            _run(engine, requests)
        assert compiled == []
