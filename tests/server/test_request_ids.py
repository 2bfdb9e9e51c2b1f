"""Every answer has an `x-request-id`, and so have the log's lines about the request."""

import io
import json
import logging.config
import re

import httpx2
import pytest

from gptjax.server import logs
from gptjax.server.generation import generation
from gptjax.server.openai import models
from tests.server.server_material import GPT_OSS, ask, chat, make, running

MADE = r"req_[0-9a-f]{24}"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/nothing", None, 404),
        ("DELETE", "/health", None, 405),
        ("OPTIONS", "/v1/models", None, 204),
        ("POST", "/v1/completions", {"prompt": "a"}, 200),
        ("POST", "/v1/completions", {"prompt": "a", "stream": True}, 200),
        ("POST", "/v1/completions", {"prompt": ""}, 400),
        ("POST", "/v1/chat/completions", {"messages": []}, 400),
    ],
)
def test_every_answer_has_one(method, path, body, status):
    found = set()
    for _ in range(2):
        response = ask(make(), method, path, content=json.dumps(body))
        assert response.status_code == status
        (name,) = response.headers.get_list("x-request-id")
        assert re.fullmatch(MADE, name)
        found.add(name)
    assert len(found) == 2


def test_refusals_and_faults_have_one(monkeypatch):
    refused = ask(make(), "GET", "/v1/models", options={"api_key": "secret"})
    assert (refused.status_code, bool(refused.headers["x-request-id"])) == (401, True)

    def broken(_):
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(models, "_model", broken)
    failed = ask(make(), "GET", "/v1/models", headers={"x-request-id": "mine"})
    assert (failed.status_code, failed.headers["x-request-id"]) == (500, "mine")


@pytest.mark.parametrize("name", ["mine", "6f1d.2:A_b-C", "a" * 128])
def test_a_clients_own_is_kept(name):
    assert ask(make(), "GET", "/health", headers={"x-request-id": name}).headers["x-request-id"] == name


@pytest.mark.parametrize(
    "name", ["", " ", "a" * 129, "a b", "a\tb", "<script>", "é", 'a"b', "a;b", "\x7f", "[" * 50_000]
)
def test_one_that_is_not_plain_is_replaced(name):
    response = ask(make(), "GET", "/health", headers={"x-request-id": name.encode()})
    assert re.fullmatch(MADE, response.headers["x-request-id"])


def test_pages_may_read_it():
    response = ask(make(), "GET", "/v1/models", headers={"origin": "http://localhost:3000"})
    exposed = response.headers["access-control-expose-headers"].lower()
    assert "x-request-id" in exposed and "x-gptjax-warning" in exposed


@pytest.fixture
def log():
    """What the log says in a form."""
    handlers = []

    def begin(form):
        handlers.append(logging.StreamHandler(io.StringIO()))
        made = logging.config.DictConfigurator(logs.config(form, "info"))
        handlers[0].setFormatter(made.configure_formatter(dict(made.config["formatters"]["all"])))
        for name in ("uvicorn", "uvicorn.access", "gptjax"):
            logging.getLogger(name).addHandler(handlers[0])
            logging.getLogger(name).setLevel("INFO")
        return handlers[0].stream

    yield begin
    for name in ("uvicorn", "uvicorn.access", "gptjax"):
        logging.getLogger(name).removeHandler(handlers[0])
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_the_log_has_it(log):
    stream = log("lines")
    with running(make()) as (_, address):
        httpx2.get(f"{address}/health", headers={"x-request-id": "mine-1"})
    assert re.search(r'"GET /health HTTP/1.1" 200 \[mine-1\]$', stream.getvalue(), re.MULTILINE)
    (line,) = [line for line in stream.getvalue().splitlines() if "Uvicorn running on" in line]
    assert line.endswith("(Press CTRL+C to quit)")


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_of_a_fault_has_it(log, monkeypatch, stream):
    def broken(*_):
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(generation.Generation, "_push", broken)
    written = log("json")
    response = chat(make(name=GPT_OSS), stream=stream)
    assert response.status_code == (200 if stream else 500)
    (line,) = [json.loads(line) for line in written.getvalue().splitlines()]
    assert line["request_id"] == response.headers["x-request-id"]
    assert "a planted fault" in line["exception"]
