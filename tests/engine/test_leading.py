"""What process 0 sends is all that another process needs to do the same, bit for bit. Here both are in one process."""

import socket

import jax
import numpy as np
import pytest

from gptjax.engine import engine, leading
from gptjax.errors import GptjaxError, RequestError
from gptjax.scheduling.policy import Policy
from gptjax.sharding.hosts import Leader, Link
from tests.engine.generated import generate
from tests.engine.test_constrained import COMPILER, CONSTRAINED, FREE
from tests.engine.test_engine import MODEL, made_params


class Sent(Leader):
    """What went over a connection."""

    def __init__(self, here: Link, there: Link) -> None:
        super().__init__({})
        self._here, self._there = here, there
        self.messages = []

    def send(self, *message, array=None) -> None:
        self._here.send(message, array)
        self.messages.append(self._there.receive())


@pytest.fixture
def sent():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as here,
        server.accept()[0] as there,
    ):
        yield Sent(Link(here), Link(there))


def test_messages_are_enough_to_do_the_same(sent, monkeypatch):
    monkeypatch.setattr(engine, "executor_of", lambda *args, **how: leading.LeadingExecutor(sent, *args, **how))
    led = engine.Engine(MODEL, made_params(), batch=4, max_length=120, compiler=COMPILER)
    led.warm_up()
    finished = [chunk for _, chunk in generate(led, [*FREE, *CONSTRAINED], None) if chunk.completion is not None]
    assert len(finished) == len(FREE) + len(CONSTRAINED)
    _ = led._executor.result

    followed = leading.execute(MODEL, made_params(), sent.messages)
    kinds = [kind for (kind, *_), _ in sent.messages]
    assert kinds[:2] == ["make", "warm_up"] and set(kinds) == {"make", "warm_up", "run", "result"}
    assert followed._features == led._executor._features
    for mine, other in zip(jax.tree.leaves(led._executor._slots), jax.tree.leaves(followed._slots), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_another_model_is_refused(sent):
    sent.send("make", "another", {}, [], 120, [])
    with pytest.raises(RequestError, match="does not have the same model as process 0"):
        leading.execute(MODEL, made_params(), sent.messages)


def test_nothing_is_dispatched_after_an_interrupt(sent, monkeypatch):
    """The others have done all of what was interrupted here."""
    executor = leading.LeadingExecutor(sent, MODEL, made_params(), policy=Policy(2, 64), pages=[9], max_length=120)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(executor, "_call", interrupted)
        _ = executor.result
    with pytest.raises(GptjaxError, match="no longer in step"):
        _ = executor.result
    assert [kind for (kind, *_), _ in sent.messages] == ["make", "result"]
