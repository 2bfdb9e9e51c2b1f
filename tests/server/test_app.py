"""What stands before the routes, and the routes that generate nothing."""

import asyncio

import httpx2
import pytest

from gptjax.server.front.app import build
from gptjax.server.front.serving import make_server
from gptjax.server.http import origins
from tests.server.server_material import GPT2, GPT_OSS, MAX_LENGTH, ask, complete, fault, make, tokenizer, until


def test_health_of_a_warm_server():
    response = ask(make(), "GET", "/health")
    body = response.json()
    assert response.status_code == 200
    assert body.pop("uptime_seconds") >= 0
    assert body == {
        "status": "healthy",
        "model": GPT2,
        "resident": True,
        "quant_kind": "F32",
        "vram_bytes_used": 1234,
        "tokenizer_kind": "hf-json",
        "tokenizer_model": "byte-level-bpe",
        "vocab_size": tokenizer().vocab_size,
        "context_length": MAX_LENGTH,
        "slots": 4,
        "busy": 0,
        "queued": 0,
        "error": None,
    }


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"ready": False}, "starting"),
        ({"heartbeat_age": 61.0}, "hung"),
        ({"error": "RuntimeError: gone", "ready": False}, "dead"),
    ],
)
def test_health_of_a_server_that_does_not_answer(change, status):
    service = make()
    vars(service.worker).update(change)
    response = ask(service, "GET", "/health")
    assert response.status_code == 503
    assert (response.json()["status"], response.json()["resident"]) == (status, False)


def test_health_while_draining():
    service = make()
    service.worker.ready = False
    service.draining.set()
    assert ask(service, "GET", "/health").json()["status"] == "draining"


def test_models():
    model = {"id": GPT_OSS, "object": "model", "created": 1700000000, "owned_by": "gptjax", "max_model_len": MAX_LENGTH}
    model |= {
        "type": "model",
        "display_name": GPT_OSS,
        "created_at": "2023-11-14T22:13:20+00:00",
        "lifecycle": "active",
    }
    model |= {"max_input_tokens": MAX_LENGTH, "max_tokens": MAX_LENGTH}
    service = make(name=GPT_OSS)
    ends = {"has_more": False, "first_id": GPT_OSS, "last_id": GPT_OSS}
    assert ask(service, "GET", "/v1/models").json() == {"object": "list", "data": [model], **ends}
    assert ask(service, "GET", f"/v1/models/{GPT_OSS}").json() == model
    assert fault(ask(service, "GET", "/v1/models/other/name"), 404)["code"] == "model_not_found"


def test_what_is_not_there():
    assert fault(ask(make(), "GET", "/v2"), 404)["code"] == "no_such_route"
    assert ask(make(), "GET", "/v1/completions").headers["allow"] == "POST"
    fault(ask(make(), "GET", "/v1/completions"), 405)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic secret"}, 401),
        ({"Authorization": "Bearer s\u00e9cret".encode("latin-1")}, 401),
        ({"Authorization": "Bearer secret"}, 200),
        ({"Authorization": "bearer secret"}, 200),
    ],
)
def test_an_api_key(headers, status):
    response = ask(make(), "GET", "/v1/models", headers=headers, options={"api_key": "secret"})
    assert response.status_code == status
    if status == 401:
        assert fault(response, 401)["code"] == "invalid_api_key"
    assert ask(make(), "GET", "/health", options={"api_key": "secret"}).status_code == 200


def test_without_a_key_any_token_passes():
    assert ask(make(), "GET", "/v1/models", headers={"Authorization": "Bearer whatever"}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "options", "allowed"),
    [
        ("http://localhost:3000", {}, "http://localhost:3000"),
        ("https://a.example", {}, None),
        ("http://localhost.a.example", {}, None),
        ("https://a.example", {"cors_origins": ["https://a.example"]}, "https://a.example"),
        ("https://a.example", {"cors_origins": ["*"]}, "*"),
    ],
)
def test_pages_of_other_origins(origin, options, allowed):
    response = ask(make(), "GET", "/v1/models", headers={"Origin": origin}, options=options)
    assert response.headers.get("access-control-allow-origin") == allowed
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    response = ask(make(), "OPTIONS", "/v1/models", headers=preflight, options={"api_key": "secret", **options})
    assert response.headers.get("access-control-allow-origin") == allowed
    assert response.is_success == (allowed is not None)


THEIRS = "https://a.example"
ALLOWED = {"cors_origins": [THEIRS]}


@pytest.mark.parametrize(
    ("headers", "options", "passes"),
    [
        ({"Origin": THEIRS}, {}, False),
        ({"Origin": "null"}, {}, False),
        ({"Origin": THEIRS, "Sec-Fetch-Site": "cross-site"}, {}, False),
        ({"Origin": "http://gpu:8000", "Host": "gpu:8000"}, {}, True),
        ({"Origin": "http://gpu:8001", "Host": "gpu:8000"}, {}, False),
        ({"Origin": THEIRS, "Sec-Fetch-Site": "same-origin"}, {}, True),  # a proxy changed the host
        ({"Origin": "http://localhost:3000"}, {}, True),
        ({"Origin": THEIRS}, ALLOWED, True),
        ({"Origin": THEIRS}, {"cors_origins": ["*"]}, True),
        ({"Origin": THEIRS, "Authorization": "Bearer secret"}, {"api_key": "secret"}, True),
        ({"Host": "a.example:8000"}, {}, True),
        ({"Host": "a.example:8000"}, {"local": True}, False),
        ({"Host": "a.example:8000", "Origin": "http://a.example:8000"}, {"local": True}, False),
        ({"Host": "a.example.:8000", "Sec-Fetch-Site": "same-origin"}, {"local": True}, False),
        ({"Host": "a.example"}, {"local": True} | ALLOWED, True),
        ({"Host": "a.example"}, {"local": True, "cors_origins": ["*"]}, True),
        ({"Host": "a.example", "Authorization": "Bearer secret"}, {"local": True, "api_key": "secret"}, True),
        ({"Host": "127.0.0.1:8000"}, {"local": True}, True),
        ({"Host": "[::1]:8000"}, {"local": True}, True),
        ({"Host": "LOCALHOST"}, {"local": True}, True),
        ({"Host": "host.docker.internal:8000"}, {"local": True}, True),
    ],
)
def test_foreign_pages_do_not_use_a_server_without_a_key(headers, options, passes):
    service = make()
    body = b'{"prompt": "a"}'  # as text/plain, which a browser sends without asking first
    response = ask(service, "POST", "/v1/completions", content=body, headers=headers, options=options)
    assert bool(service.worker.requests) == passes
    if not passes:
        assert fault(response, 403)["code"] == "foreign_page"


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("192.168.0.2", False), ("a", False)],
)
def test_a_server_that_others_reach_is_not_local(caplog, host, local):
    server = make_server(make(), host=host, port=0, drain_seconds=0)
    assert bool(caplog.records) != local
    response = asyncio.run(models_as("a.example", server.config.app))
    assert response.status_code == (403 if local else 200)


async def models_as(host, application):
    transport = httpx2.ASGITransport(application)
    async with httpx2.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        return await client.get("/v1/models")


def test_options_by_itself_is_answered():
    assert ask(make(), "OPTIONS", "/v1/completions").status_code == 204


def test_a_body_that_is_too_large():
    error = fault(ask(make(body_bytes=1000), "POST", "/v1/completions", content=b"x" * 1001), 413)
    assert error["message"] == "the body is larger than 1000 bytes"

    async def pieces():
        for _ in range(11):
            yield b" " * 100

    fault(ask(make(body_bytes=1000), "POST", "/v1/completions", content=pieces()), 413)


def test_bodies_that_are_too_large_together():
    service = make(body_bytes=100_000)
    whole = asyncio.Event()

    async def slow():
        yield b" " * 90_000
        await whole.wait()
        yield b'{"prompt": "a"}'

    async def run():
        transport = httpx2.ASGITransport(build(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            slow_ones = [asyncio.ensure_future(client.post("/v1/completions", content=slow())) for _ in range(4)]
            await until(lambda: len(service._bodies) == 4)
            large = await client.post("/v1/completions", content=b" " * 90_000)
            small = await client.post("/v1/completions", content=b'{"prompt": "a"}')
            whole.set()
            return large, small, await asyncio.gather(*slow_ones)

    large, small, slow_ones = asyncio.run(run())
    assert fault(large, 429)["code"] == "queue_full"
    assert "retry-after" in large.headers
    assert [response.status_code for response in (small, *slow_ones)] == [200] * 5
    assert not service._bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"prompt"',
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "metadata": {"much": 1e999}}',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        '{"prompt": "a"}'.encode("utf-16"),
    ],
)
def test_a_body_that_is_no_json_object(body):
    assert fault(ask(make(), "POST", "/v1/completions", content=body))["code"] == "bad_json"


def test_a_fault_of_ours_is_a_500_that_is_not_to_be_sent_again():
    def broken(request):
        raise ZeroDivisionError("secret")

    service = make()
    service.worker.submit = broken
    content = '{"prompt": "a"}'
    response = ask(service, "POST", "/v1/completions", content=content, headers={"Origin": "http://localhost:3000"})
    error = fault(response, 500)
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"  # or the page could not read it
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in error["message"]


def test_a_fault_before_the_routes_is_answered_and_counted_as_well(monkeypatch):
    def refusal(self, headers):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(origins.Pages, "refusal", refusal)
    service = make()
    response = ask(service, "GET", "/v1/models", headers={"Origin": "http://localhost:3000"})
    assert fault(response, 500)["code"] == "internal"
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
    metrics = ask(service, "GET", "/metrics").text
    assert 'gptjax_errors_total{code="internal"} 1.0' in metrics
    assert 'status="500"' in metrics


def test_a_server_that_is_full_or_ends():
    service = make()
    service.worker.room = 0
    response = complete(service)
    assert fault(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "3"
    service.worker.refusal = "the server is shutting down"
    response = complete(service)
    assert fault(response, 503)["message"] == "the server is shutting down"
    assert "retry-after" in response.headers
