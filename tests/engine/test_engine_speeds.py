"""What many slots cost a single request. Needs a machine that does nothing else."""

import time

import pytest

from gptjax.engine.engine import Engine
from gptjax.engine.free_of_load import is_free_of_load
from gptjax.engine.request import Request, SamplingParams

TURNS, TOKENS = 7, 60


def _seconds(engine: Engine, number: int) -> float:
    """From the first token of a request to its last, with nobody else in the engine."""
    request = engine.add(Request((number + 1,), TOKENS, SamplingParams(temperature=0, seed=0)))
    drawn = 0
    while not drawn:
        drawn += len(engine.step())
    began = time.perf_counter()
    while drawn < TOKENS:
        drawn += len(engine.step())
    seconds = time.perf_counter() - began
    engine.end(request)
    return seconds


@pytest.mark.quiet
def test_one_request_of_32_slots_is_as_fast_as_of_one(lm):
    """In turns, the best of each."""
    if not is_free_of_load(lm.model):
        pytest.skip("on this device, a step computes all rows, so that bits do not depend on their number")
    engines = [Engine(lm.model, lm.params, batch=slots, max_length=512) for slots in (1, 32)]
    for engine in engines:
        _seconds(engine, 0)  # compiles what it needs
    alone, of_32 = (min(each) for each in zip(*([_seconds(e, n) for e in engines] for n in range(TURNS)), strict=True))
    print(f"{(TOKENS - 1) / alone:.0f} tokens/s of one slot, {(TOKENS - 1) / of_32:.0f} of 32")
    assert alone / of_32 >= 0.9
