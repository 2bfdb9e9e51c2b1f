"""Whatever is large in a request, the answer is small and comes soon, and other clients are still answered."""

import asyncio
import json
import threading
import time

import httpx2
import pytest

from gptjax.text import Tokenizer
from tests.fuzz import TIMES, rounds
from tests.server.server_material import GPT2, GPT_OSS, USER, answer, ask, fault, make, post, running
from tests.thinned import thinned

SIZE = min(5_000_000, rounds(30_000) if TIMES > 1 else 30_000)  # bytes, about
MOST = 10_000

FIELDS = """model prompt n best_of suffix echo max_tokens temperature top_p top_k min_p repetition_penalty
presence_penalty frequency_penalty logit_bias seed stop stop_token_ids ignore_eos stream stream_options logprobs
top_logprobs tools tool_choice messages reasoning_effort response_format modalities parallel_tool_calls functions
function_call max_completion_tokens user metadata store service_tier input instructions reasoning text include
max_output_tokens background conversation previous_response_id truncation safety_identifier prompt_cache_key
parse_special guided_choice structured_outputs chat_template_kwargs client_metadata colour""".split()
PLACES = {
    "/v1/completions": [({"prompt": "a"}, ())],
    "/v1/chat/completions": [
        ({"messages": [USER]}, ()),
        ({"messages": [USER, {"role": "user", "content": "a"}]}, ("messages", 1)),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, ("messages", 1)),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            ("messages", 1, "content", 0),
        ),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}, ("tools", 0)),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}, ("tools", 0, "function")),
        (
            {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            ("tools", 0, "function", "parameters"),
        ),
    ],
    "/v1/responses": [
        ({"input": "a"}, ()),
        ({"input": [{"role": "user", "content": "a"}]}, ("input", 0)),
        ({"input": [USER, {"type": "reasoning", "content": []}]}, ("input", 1)),
        ({"input": [USER, {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}]}, ("input", 1)),
        ({"input": [USER, {"type": "function_call_output", "call_id": "a", "output": ""}]}, ("input", 1)),
        ({"input": "a", "tools": [{"type": "function", "name": "f"}]}, ("tools", 0)),
        ({"input": "a", "tools": [{"type": "namespace", "name": "n", "tools": []}]}, ("tools", 0)),
        ({"input": "a", "text": {}}, ("text",)),
        ({"input": "a", "reasoning": {}}, ("reasoning",)),
    ],
}
INNER = """role content name tool_calls tool_call_id reasoning_content refusal phase type function text id call_id
arguments output summary encrypted_content parameters description strict format verbosity effort properties enum
default items namespace tools thinking_blocks reasoning_details cache_control colour""".split()
LARGE = {
    "a string": "x" * SIZE,
    "a list of numbers": [1] * (SIZE // 3),
    "a list of strings": ["xy"] * (SIZE // 6),
    "a list of a long string": ["\x01" * (SIZE // 6)],
    "a list of lists": [[[]]] * (SIZE // 6),
    "an object": {f"{number:06}": number for number in range(SIZE // 18)},
    "an object with a long name": {"x" * SIZE: 1},
    "objects": [{"type": "x" * (SIZE // 10)}] * 10,
}


def bodies(base, path, value):
    """The request with a value in each of its fields there, and with it as a field's name."""
    for name in FIELDS if not path else INNER:
        body = json.loads(json.dumps(base))
        place = body
        for step in path:
            place = place[step]
        place[name] = value
        yield name, body


@pytest.fixture(scope="module")
def services():
    return {route: make(name=GPT2 if route == "/v1/completions" else GPT_OSS) for route in PLACES}


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", thinned(LARGE, "a string", "a list of lists", "an object"))
@pytest.mark.parametrize("route", PLACES)
def test_an_answer_is_small(services, route, kind):
    text = json.dumps(LARGE[kind])
    with asyncio.Runner() as runner:
        for base, path in PLACES[route]:
            for name, body in bodies(base, path, "VALUE"):
                began = time.process_time()  # of this process: others may keep the machine busy
                content = json.dumps(body).replace('"VALUE"', text)
                response = runner.run(answer(services[route], "POST", route, content=content))
                assert response.status_code in (200, 400, 404), (path, name, response.text)
                repeated = len(content) if response.status_code == 200 else 0  # tools with their parameters
                assert len(response.content) < MOST + repeated, (path, name, response.content[:200])
                assert time.process_time() - began < 3, (path, name)


@pytest.mark.parametrize("route", PLACES)
def test_the_names_of_fields_are_shortened(services, route):
    base, _ = PLACES[route][0]
    error = fault(post(services[route], route, base | {"x" * 100_000: 1}))
    assert len(error["message"]) + len(error["param"]) < 400
    assert fault(post(services[route], route, base | {"model": "x" * 100_000}), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("header", ["host", "origin", "authorization", "x-request-id", "content-type", "accept"])
def test_headers_are_not_repeated(header):
    for options in ({}, {"local": True}, {"api_key": "secret"}):
        response = ask(make(), "GET", "/v1/models", headers={header: "[" * 50_000}, options=options)
        assert len(response.content) + sum(map(len, response.headers.values())) < MOST
        assert response.status_code < 500


@pytest.mark.parametrize(
    "path", ["/health/", "/v1/models/", "/metrics/", "/v1/completions/", "/x//example.org", "/" + "x/" * 20_000]
)
@pytest.mark.parametrize("host", ["example.org", "[", "a/b?c#d", "", "a" * 10_000])
def test_no_answer_sends_a_client_elsewhere(path, host):
    response = ask(make(), "GET", path, headers={"host": host})
    assert response.status_code == 404
    assert "location" not in response.headers
    assert "example.org" not in response.text.replace("/x//example.org", "")
    assert len(response.content) < MOST


def test_a_token_has_one_bias(services):
    for key in ("01", "00", "1_0", "+1", " 1", "1 ", "-0", "1.0", "\u0661"):
        body = {"prompt": "a", "logit_bias": {"1": 1, key: -1}}
        assert fault(post(services["/v1/completions"], "/v1/completions", body))["param"] == "logit_bias"


def test_an_echo_is_bounded():
    """`n`, and the alternatives of each token, multiply what was sent."""
    service = make()
    body = {"prompt": [[1] * 390] * 2, "echo": True, "logprobs": 20, "max_tokens": 0}
    assert post(service, "/v1/completions", body).status_code == 200
    error = fault(post(service, "/v1/completions", body | {"n": 64}))
    assert (error["param"], error["code"]) == ("echo", "too_large")


@pytest.mark.parametrize("name", ["instructions", "tools"])
def test_what_an_answer_repeats_is_bounded(name):
    service = make(name=GPT_OSS)
    large = {
        "instructions": " " * 1_100_000,
        "tools": [{"type": "function", "name": "f", "parameters": {"x": [1] * 600_000}}],
    }
    for more in ({}, {"tool_choice": "none"}):
        error = fault(post(service, "/v1/responses", {"input": "a", name: large[name]} | more))
        assert error["param"] == name
    deep = []
    for _ in range(500):
        deep = [deep]
    tools = [{"type": "function", "name": "f", "parameters": {"default": deep}}]
    error = fault(post(service, "/v1/responses", {"input": "a", "tools": tools, "tool_choice": "none"}))
    assert error["param"] == "tools"


HUGE = {
    "a string": '{"prompt": "' + "a " * 5_000_000 + '"}',
    "spaces": '{"prompt": "' + " " * 10_000_000 + '"}',
    "ids": '{"prompt": [' + "1," * 5_000_000 + "1]}",
    "lists": '{"prompt": [' + "[]," * 3_000_000 + "[]]}",
    "objects": '{"prompt": [' + "{}," * 3_000_000 + "{}]}",
    "names": '{"prompt": {' + ",".join(f'"{number:07}":0' for number in range(850_000)) + "}}",
    "nested": '{"prompt": ' + "[" * 9_000_000 + "}",
    "no JSON": "{" + "x" * 10_000_000,
    "escapes": '{"prompt": "' + "\\u0000" * 1_700_000 + '"}',
    "numbers": '{"prompt": [' + "1e1," * 2_500_000 + "1]}",
    "marks": '{"prompt": "' + "<|endoftext|>" * 750_000 + '"}',
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HUGE)
def test_health_is_answered_while_the_largest_body_is_read(kind):
    service = make()
    waits = []
    with running(service) as (_, address):
        done = threading.Event()

        def look():
            with httpx2.Client() as client:
                while not done.is_set():
                    began = time.monotonic()
                    assert client.get(f"{address}/health", timeout=30).status_code == 200
                    waits.append(time.monotonic() - began)
                    time.sleep(0.01)

        looking = threading.Thread(target=look)
        looking.start()
        began = time.monotonic()
        try:
            response = httpx2.post(f"{address}/v1/completions", content=HUGE[kind], timeout=60)
        finally:
            done.set()
            looking.join()
    print(f"{kind}: {response.status_code} after {time.monotonic() - began:.2f} s, /health within {max(waits):.2f} s")
    assert response.status_code == 400
    assert len(response.content) < MOST
    assert max(waits) < 3


@pytest.mark.parametrize("kind", ["ids", "lists", "objects", "nested", "numbers"])
def test_no_more_values_are_parsed_than_a_request_can_need(monkeypatch, kind):
    """Three million lists of 9 MB would be 200 MB, made while no other thread runs."""
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    response = ask(make(), "POST", "/v1/completions", content=HUGE[kind])
    assert response.status_code == 400 and '"too_large"' in response.text


def test_as_many_ids_as_fit_a_request_are_parsed():
    body = '{"prompt": [' + ",".join(f"[{'1,' * 4095}1]" for _ in range(128)) + "]}"
    assert '"too_large"' not in ask(make(), "POST", "/v1/completions", content=body).text


@pytest.mark.parametrize("text", ["the king ", " ", "x", "<|endoftext|>", "é", "\u3042"])
def test_no_more_is_encoded_than_could_fit(monkeypatch, text):
    """Encoding ten million characters takes a tokenizer gigabytes, and 20 s."""
    service = make(name=GPT_OSS)
    monkeypatch.setattr(service.served.tokenizer, "longest_token", 128)  # as GPT-OSS's own has
    encoded, encode = [], Tokenizer.encode

    def counted(self, given, **options):
        encoded.append(len(given))
        return encode(self, given, **options)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    object.__setattr__(service.served, "max_length", 131_072)
    for size in (9_900_000, 2_000_000):
        error = fault(post(service, "/v1/completions", {"prompt": text * (size // (len(json.dumps(text)) - 2))}))
        assert error["code"] == "context_length_exceeded"
    assert sum(encoded) < 17 * 131_072


def test_a_long_text_that_fits_is_encoded_as_a_whole():
    service = make(name=GPT_OSS)
    object.__setattr__(service.served, "max_length", 131_072)
    service.worker.max_length = 131_072
    text = "Once upon a time there was a king. <|end|>" * 3_000
    assert post(service, "/v1/completions", {"prompt": text}).status_code == 200
    assert list(service.worker.requests[0].prompt_ids) == service.served.tokenizer.encode(text, special=True)


def test_a_number_that_the_library_refuses_is_named():
    assert (
        fault(post(make(), "/v1/completions", {"prompt": "a", "repetition_penalty": 1e-38}))["param"]
        == "repetition_penalty"
    )
