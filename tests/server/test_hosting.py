"""The engine's process, without a model and without the process that speaks HTTP."""

import contextlib
import gc
import signal
import socket
import subprocess
import sys
import threading

import pytest

from gptjax.server.ipc.channel import Channel
from gptjax.server.ipc.messages import Compiled, Progress, Setup, Signal
from gptjax.server.ipc.settings import Limits
from gptjax.server.worker import front_process, hosting
from gptjax.server.worker.front_process import FrontProcess
from tests.server.fake_worker import FakeWorker
from tests.server.worker_material import FACTS


def messages(channel, kind):
    return next(message for message in channel.messages() if isinstance(message, kind))


def test_it_tells_the_front_what_to_serve_and_of_signals_and_keeps_from_the_collector_what_stays(monkeypatch):
    called, handlers = [], {}
    monkeypatch.setattr(gc, "collect", lambda: called.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: called.append("freeze"))
    monkeypatch.setattr(sys, "setswitchinterval", called.append)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    worker = FakeWorker(lambda _: [], max_length=400)
    worker.ready = False
    worker.start = lambda: called.append("start")
    worker.wait_until_compiled = lambda: called.append("compiled") or True
    monkeypatch.setattr(hosting, "Worker", lambda lm, *, max_queue, chunk: called.append(chunk) or worker)
    monkeypatch.setattr(hosting, "memory_in_use", lambda lm: lambda: 9)
    near, far = map(Channel, socket.socketpair())
    ended = threading.Event()

    class Front:
        channel = near

        def wait(self):
            assert ended.wait(60)
            return 1

    options = {"max_queue": 3, "prefill_chunk": 64, "limits": Limits(rows=2), "options": {"port": 1}}
    found = []
    serving = threading.Thread(target=lambda: found.append(hosting.serve(None, FACTS, Front(), **options)))
    with contextlib.closing(near), contextlib.closing(far):
        serving.start()
        assert far.receive() == Setup(FACTS, 3, worker.state, 9, Limits(rows=2), {"port": 1})
        assert messages(far, Progress).state.ready is False
        assert called == [64, "start", 0.0005]  # how soon threads take turns
        worker.ready = True
        assert messages(far, Compiled) == Compiled(True)
        assert called[3:] == ["collect", "freeze", "compiled", "freeze"]
        assert set(handlers) == {signal.SIGINT, signal.SIGTERM}
        handlers[signal.SIGINT](signal.SIGINT, None)
        assert messages(far, Signal) == Signal(signal.SIGINT)
        ended.set()
        serving.join(60)
    assert found == [1]


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("", 0, None),
        ("sys.exit(1)", 1, None),  # it has said why
        ("sys.exit(3)", 1, "the process that speaks HTTP ended with status 3"),
        ("os.kill(os.getpid(), 9)", 1, "the process that speaks HTTP was ended by SIGKILL"),
    ],
)
def test_the_fronts_end_is_the_servers(monkeypatch, caplog, code, status, said):
    monkeypatch.setattr(front_process, "COMMAND", (sys.executable, "-c", f"import os, sys; {code}"))
    with FrontProcess("text") as front:
        assert front.wait() == status
    assert [record.message for record in caplog.records] == ([] if said is None else [said])


def test_a_front_gets_its_text_and_modules_but_no_signals_and_is_ended(monkeypatch, tmp_path):
    """Not even a module in the current directory takes the place of another."""
    (tmp_path / "socket.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "front.py").write_text(
        "import signal, socket, sys, time\n"
        "from gptjax.server.ipc.channel import Channel\n"
        "channel = Channel(socket.socket(fileno=int(sys.argv[1])))\n"
        "blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "channel.send((channel.receive(), sorted(blocked), sys.stdin.read()))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(front_process, "COMMAND", (sys.executable, "-P", "front.py"))
    with FrontProcess("text") as front:
        assert front.channel.receive() == ("text", [signal.SIGINT, signal.SIGTERM], "")
        process = front._process
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


def test_the_front_alone_ends_at_once():
    """As if the other process had died before it said anything."""
    ours, theirs = socket.socketpair()
    command = [*front_process.COMMAND, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE) as process:
        theirs.close()
        ours.close()
        assert process.communicate(timeout=60) == (None, b"")
    assert process.returncode == 0
