"""What a worker calls: chunks of the usual size, several steps at once, and nothing that is not compiled yet."""

import jax
import numpy as np
import pytest

from gptjax.engine.engine import Engine
from gptjax.engine.request import Request, SamplingParams
from gptjax.server.ipc.events import Finished
from gptjax.server.worker.worker import Worker
from pallas_kernels import same_bits
from tests.compilations import compilations
from tests.server.worker_material import (
    CHUNK,
    MAX_LENGTH,
    REQUESTS,
    SLOTS,
    Alone,
    Reader,
    ids_of,
    request_of,
    submit,
    until,
)
from tests.shallow import shallow


@pytest.fixture(scope="module")
def model():
    return shallow("gpt2-tales", max_length=MAX_LENGTH, max_batch=SLOTS)


@pytest.fixture(scope="module")
def eight_steps(model):
    """A worker that asks for eight steps at a time, as on a GPU."""
    worker = Worker(model, chunk=CHUNK, steps_per_dispatch=8)
    worker.start()
    worker.wait_until_ready()
    yield worker
    worker.stop()


def test_chunks_of_the_usual_size_give_what_the_model_itself_gives():
    small = shallow("gpt2-tales", max_length=128, max_batch=2)
    expected = small.generate("Once upon a time", max_tokens=20)
    worker = Worker(small)
    worker.start()
    request = Request(tuple(small.tokenizer.encode("Once upon a time")), 20, SamplingParams(seed=0), small.eos_ids)
    readers = [submit(worker, each) for each in (request, request_of(1, 100), request)]
    for reader in (readers[0], readers[2]):
        reader.wait()
        assert tuple(token for token, _, _ in reader.tokens) == expected.token_ids
        assert tuple(logprob for _, logprob, _ in reader.tokens) == expected.logprobs
    worker.stop()


def test_the_event_loop_is_woken_once_for_all_tokens_of_a_dispatch(eight_steps, monkeypatch):
    """Four requests that all draw eight tokens at a time."""
    dispatches, woken, read = [], [], Engine._read
    monkeypatch.setattr(Engine, "_read", lambda *a: (dispatches.append(1), read(*a))[1])

    class Woken(Reader):
        def _deliver(self, event):
            super()._deliver(event)
            return wake

    def wake():
        woken.append(1)

    readers = [Woken(eight_steps, request_of(number, 5, 41)) for number in range(SLOTS)]
    for reader in readers:
        assert reader.end.completion_tokens == 41
        assert sum(reader.together) == 41 and set(reader.together) >= {1, 8}
    until(lambda: eight_steps.state.busy == 0)
    assert len(dispatches) <= len(woken) <= len(dispatches) + 1


@pytest.mark.thorough
def test_several_steps_a_dispatch_give_the_same_bits(model, eight_steps):
    """As on a GPU, where the device is asked for eight steps at a time, and works ahead of what was cancelled."""
    worker, alone = eight_steps, Alone(model)
    left = Reader(worker, request_of(2, 5, 290), on_token=lambda r: len(r.events) > 5 and worker.cancel(r.ticket))
    readers = [submit(worker, request) for request in REQUESTS]
    for number, reader in enumerate(readers):
        assert reader.end.reason == "length"
        assert reader.tokens == alone(REQUESTS[number]), number
    assert 5 < left.end.completion_tokens == len(left.tokens) <= 5 + 8  # nothing came after those that it had
    assert max(max(reader.together) for reader in (left, *readers)) == 8


@pytest.mark.thorough
def test_nothing_is_compiled_after_warm_up():
    """With a model that has a window. What is only read from the disk counts, too."""
    jax.clear_caches()  # nothing is there from before
    worker = Worker(shallow("gpt-oss-tales", max_length=MAX_LENGTH, max_batch=SLOTS), chunk=CHUNK)
    worker.start()
    worker.wait_until_ready()
    assert worker.wait_until_compiled()
    try:
        with compilations() as compiled:
            readers = [Reader(worker, request) for request in REQUESTS]
            readers += [Reader(worker, request_of(2, 290, 3))]
            worker.cancel(readers[3].ticket)
            assert all(isinstance(reader.end, Finished) for reader in readers)
            cached = [Reader(worker, Request(ids_of(1, n), 3, SamplingParams())).end.cached_tokens for n in (70, 200)]
            # Of 70 tokens, the whole chunk if bits depend on where a prompt is cut.
            assert cached == [0, 70 if same_bits.holds() else 64]
            assert compiled == []
            jax.jit(lambda x: x * 3.5)(np.ones(3))  # the listener does hear a compilation
            assert compiled != []
    finally:
        worker.stop()
