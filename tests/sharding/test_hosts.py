"""Processes that belong together: how they meet, what they hear, and how one that is lost ends the others."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time

import jax
import pytest

import gptjax
from gptjax.cli import _parser, main
from gptjax.sharding import hosts
from tests.import_graph import ROOT

LOST = 45  # seconds: of 60 that are promised
# After a first sum of both, process 0 waits in a second one for process 1, which does nothing.
WAITS = """
import sys, time, jax, jax.numpy as jnp
from gptjax.sharding import hosts
with hosts.joined(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2])) as follows:
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    add = lambda: jax.lax.psum(jnp.ones(()), "tensor")
    add = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=(), out_specs=jax.P()))
    jax.block_until_ready(add())
    print("here", flush=True)
    time.sleep(600) if follows else jax.block_until_ready(add())
"""


def _both(*command: str) -> list[subprocess.Popen]:
    """Two processes, 0 and 1, of a command that has PORT, for a free one, and PROCESS, for the number."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    return [
        subprocess.Popen(
            [sys.executable, *(each.replace("PORT", str(port)).replace("PROCESS", str(process)) for each in command)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]


def _end(both: list[subprocess.Popen]) -> None:
    for process in both:
        process.kill()
        process.communicate()


@pytest.mark.thorough  # two processes that compile a whole demo; those below meet and compute as well
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("gpt2-tales", "tensor=2"), ("gpt-oss-tales", "tensor=2"), ("gpt2-tales", "data=2")],
)
def test_two_processes_draw_what_one_draws(name, mesh):
    """Penalties count the prompt, which process 1 needs for that. With `data`, each has rows of its own."""
    settings = {"max_tokens": 12, "temperature": 0, "repetition_penalty": 1.3, "top_logprobs": 2}
    options = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    hosts_options = ["--coordinator", "127.0.0.1:PORT", "--num-processes", "2", "--process-id", "PROCESS"]
    command = ["generate", "Once upon a time", "-m", name, "--json", "--mesh", mesh, "--max-length", "64"]
    both = _both("-m", "gptjax", *command, *options, *hosts_options)
    try:
        (leading, errors), (following, others) = (process.communicate(timeout=600) for process in both)
        assert [process.returncode for process in both] == [0, 0], errors + others
    finally:
        _end(both)
    with gptjax.load(name, max_length=64) as lm:
        expected = lm.generate("Once upon a time", **settings)
    found = json.loads(leading.splitlines()[-1])  # Gloo's own words come before
    assert found["token_ids"] == list(expected.token_ids)
    assert found["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    assert not [line for line in following.splitlines() if "Gloo" not in line]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other(lost):
    both = _both("-c", WAITS, "PORT", "PROCESS")
    try:
        for process in both:
            while "here" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
        both[lost].kill()
        _, errors = both[1 - lost].communicate(timeout=LOST)
        assert both[1 - lost].returncode not in (0, None)
        ours, of_jax = (
            f"this process cannot go on: process {lost} is gone",
            "most likely indicates that another task died",
        )
        assert ours in errors or (lost == 0 and of_jax in errors)  # process 0 has JAX's coordinator, which JAX misses
    finally:
        _end(both)


def test_a_process_that_fails_says_why():
    """One that cannot load its model, for example, while the others wait for it."""
    both = _both("-m", "gptjax", "generate", "x", "-m", "gpt2-tales", "--mesh", "tensor=2", "--max-length", "PROCESS",
                 "--coordinator", "127.0.0.1:PORT", "--num-processes", "2", "--process-id", "PROCESS")  # fmt: skip
    try:
        outputs = [process.communicate(timeout=LOST)[1] for process in both]
    finally:
        _end(both)
    assert [process.returncode for process in both] == [1, 1]
    assert "gptjax: --max-length must be" in outputs[0]
    assert "this process cannot go on: process 0 failed: max_length must be" in outputs[1]


@pytest.mark.parametrize("name", ["multihost.md", "multihost-slurm.sh", "multihost-jobset.yaml"])
def test_the_options_of_examples_exist(name):
    """The scripts need a cluster."""
    text = re.sub("^#SBATCH.*", "", (ROOT / "examples" / name).read_text(), flags=re.M)
    options = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--kill-on-bad-exit"}
    commands = next(action for action in _parser()._actions if action.dest == "command").choices
    assert {"--coordinator", "--num-processes", "--process-id", "--mesh"} <= options
    assert options <= commands["serve"]._option_string_actions.keys()


@pytest.mark.parametrize(("coordinator", "given"), [("10.0.0.1:1", ("10.0.0.1:1", 2, 1)), (hosts.AUTO, (None,) * 3)])
def test_jax_ends_all_if_a_host_is_silent(coordinator, given, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **how: calls.append((args, how)))
    hosts._initialize(coordinator, *given[1:])
    ((args, how),) = calls
    assert args == given and how["heartbeat_timeout_seconds"] <= LOST
    assert (how["cluster_detection_method"] == "deactivate") == (coordinator != hosts.AUTO)


@pytest.fixture
def ends():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as here,
        server.accept()[0] as there,
    ):
        yield here, there


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("<II", 1 << 30, 0)])
def test_nobody_waits_for_what_is_too_much(ends, sent):
    here, there = ends
    there.settimeout(10)
    here.sendall(sent)
    began = time.monotonic()
    assert hosts.Link(there).receive() is None and time.monotonic() - began < 5


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        struct.pack("<II", 2, 0) + b"{}",
        struct.pack("<II", 4, 0) + b"\x80\x05N.",  # a pickle
        struct.pack("<II", 9, 4) + b"[1,[1,2]]" + b"1234",
    ],
)
def test_what_is_not_a_message_counts_as_the_end(ends, sent):
    here, there = ends
    here.sendall(sent)
    here.shutdown(socket.SHUT_WR)
    assert hosts.Link(there).receive() is None


def test_only_those_who_know_the_secret_are_accepted():
    secret = bytes(range(32))
    with socket.create_server(("127.0.0.1", 0)) as server:
        greetings = [(b"x" * 32, 1), (secret, 7), (secret, 0), (secret, 1)]
        ends = [socket.create_connection(server.getsockname()) for _ in greetings]
        for end, greeting in zip(ends, greetings, strict=True):
            end.settimeout(10)
            end.sendall(struct.pack("<32sI", *greeting))
        found: dict[int, hosts.Link] = {}
        accepting = threading.Thread(target=lambda: found.update(hosts._accepted(server, secret, 2)))
        accepting.start()
        accepting.join(30)
        assert list(found) == [1]
        assert [end.recv(1) for end in ends[:3]] == [b"", b"", b""]
        found[1].send(["end", None])
        assert hosts.Link(ends[3]).receive() == (["end", None], None)
        found[1]._socket.close()
        for end in ends:
            end.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--process-id", "1"], "--num-processes and --process-id need --coordinator"),
        (["--coordinator", "auto"], "--coordinator needs --mesh"),
        (["--coordinator", "h:1", "--mesh", "tensor=2", "--num-processes", "2"], "--process-id from 0 to N - 1"),
        (
            ["--coordinator", "h:1", "--mesh", "tensor=2", "--num-processes", "2", "--process-id", "2"],
            "from 0 to N - 1",
        ),
        (["--coordinator", "h", "--mesh", "tensor=2", "--num-processes", "2", "--process-id", "0"], "with a port"),
    ],
)
def test_options_that_do_not_say_who_belongs_together(options, message, capsys):
    assert main(["generate", "x", *options]) == 1
    assert message in capsys.readouterr().err
