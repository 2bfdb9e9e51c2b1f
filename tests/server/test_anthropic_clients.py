"""Anthropic's own Python library and Claude Code, unchanged, against the server; the model's side is scripted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.server.ipc.events import Failed
from tests.server.anthropic_material import SIGNED, WEATHER, events, fault, message
from tests.server.responses_material import ANSWER, CALL, LOOK, THOUGHT, talking
from tests.server.server_material import GPT_OSS, USER, make, post, running, saying
from tests.server.test_openai_types import check

pytestmark = pytest.mark.clients

CLAUDE_CODE = Path(sys.prefix) / "claude-code" / "node_modules" / ".bin" / "claude"  # make claude-code
TURN = THOUGHT + LOOK + CALL
OPTIONS = {"model": GPT_OSS, "max_tokens": 100}


@pytest.fixture
def ask():
    """A client of a server whose model says these texts, and the server's worker."""
    import anthropic

    clients, servers = [], []

    def start(*texts, script=None, **more):
        service = make(script or saying(*texts, name=GPT_OSS), name=GPT_OSS, **more)
        servers.append(running(service))
        _, address = servers[-1].__enter__()
        clients.append(anthropic.Anthropic(base_url=address, api_key="any", max_retries=0))
        return clients[-1], service.worker

    yield start
    for client in clients:
        client.close()
    for server in servers:
        server.__exit__(None, None, None)


def test_two_turns_with_a_tool(ask):
    client, worker = ask(TURN, THOUGHT + ANSWER)
    messages = [USER]
    first = client.messages.create(messages=messages, tools=[WEATHER], thinking={"type": "adaptive"}, **OPTIONS)
    assert first._request_id.startswith("req_")
    assert first.stop_reason == "tool_use"
    thinking, text, call = first.content
    assert (thinking.thinking, text.text, call.input) == (SIGNED["thinking"], "Let me look.", {"city": "Oslo"})
    answer = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    messages += [first.to_param(), {"role": "user", "content": [answer]}]
    counted = client.messages.count_tokens(model=GPT_OSS, messages=messages, tools=[WEATHER])
    with client.messages.stream(messages=messages, tools=[WEATHER], **OPTIONS) as stream:
        assert "".join(stream.text_stream) == "It was late."
        last = stream.get_final_message()
    assert counted.input_tokens == len(worker.requests[-1].prompt_ids)
    assert last.usage.input_tokens + last.usage.cache_read_input_tokens == counted.input_tokens
    assert [block.type for block in last.content] == ["thinking", "text"] and last.stop_reason == "end_turn"


def test_a_stream_accumulates_to_the_whole(ask):
    client, _ = ask(TURN)
    fields = {"messages": [USER], "tools": [WEATHER], **OPTIONS}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json"} <= kinds
    one, other = (json.loads(each.to_json()) for each in (whole, streamed))
    for each in (one, other):
        each.pop("id"), each["content"][-1].pop("id")
    for block in other["content"]:
        block.pop("parsed_output", None)
    assert other == one


def test_the_model(ask):
    from anthropic.types import ModelInfo

    client, _ = ask(ANSWER, aliases=("claude-*",))
    (model,) = client.models.list()
    assert model == client.models.retrieve("claude-x")
    assert (model.id, model.max_input_tokens, model.created_at.year) == (GPT_OSS, 400, 2023)
    check(ModelInfo, json.loads(model.to_json()))


def test_an_answer_of_a_form(ask):
    import pydantic

    class Pet(pydantic.BaseModel):
        animal: str

    client, worker = ask('<|channel|>final<|message|>{"animal": "cat"}<|return|>')
    parsed = client.messages.parse(messages=[USER], output_format=Pet, **OPTIONS)
    assert parsed.parsed_output == Pet(animal="cat")
    assert "animal" in worker.requests[-1].grammar.source


def test_errors_are_its_classes(ask):
    import anthropic

    client, worker = ask(ANSWER)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long") as found:
        client.messages.create(messages=[{"role": "user", "content": "a b " * 300}], **OPTIONS)
    assert (found.value.type, found.value.request_id[:4]) == ("invalid_request_error", "req_")
    with pytest.raises(anthropic.NotFoundError, match="unknown model 'claude-x'"):
        client.messages.create(messages=[USER], model="claude-x", max_tokens=9)
    worker.room = 0
    with pytest.raises(anthropic.RateLimitError):
        client.messages.create(messages=[USER], **OPTIONS)
    worker.refusal = "the server is shutting down"
    with pytest.raises(anthropic.ServiceUnavailableError) as found:
        client.messages.create(messages=[USER], **OPTIONS)
    assert found.value.type == "overloaded_error"
    broken, _ = ask(script=lambda _: [5, Failed("it broke", "not_finite")])
    with pytest.raises(anthropic.InternalServerError, match="it broke"):
        broken.messages.create(messages=[USER], **OPTIONS)
    with (
        pytest.raises(anthropic.APIStatusError, match="it broke"),
        broken.messages.stream(messages=[USER], **OPTIONS) as stream,
    ):
        stream.until_done()


@pytest.mark.parametrize("answer", [TURN, THOUGHT + ANSWER])
@pytest.mark.parametrize(
    "fields",
    [{}, {"max_tokens": 4}, {"thinking": {"type": "adaptive", "display": "omitted"}}, {"stop_sequences": ["was"]}],
)
def test_answers_are_as_it_declares_them(fields, answer):
    from anthropic.types import Message, RawMessageStreamEvent

    body = {"tools": [WEATHER]} | fields
    check(Message, message(talking(answer), **body).json())
    for event in events(message(talking(answer), stream=True, **body)):
        check(RawMessageStreamEvent, event)


def test_errors_and_counts_are_as_it_declares_them():
    from anthropic.types import ErrorResponse, MessageTokensCount

    service = talking(ANSWER)
    check(MessageTokensCount, post(service, "/v1/messages/count_tokens", {"messages": [USER]}).json())
    for fields, status in (({"colour": 1}, 400), ({"model": "a"}, 404)):
        found = message(service, **fields)
        fault(found, status)
        check(ErrorResponse, found.json())


def test_claude_code_reads_a_file(tmp_path):
    if not CLAUDE_CODE.exists():
        pytest.skip("there is no Claude Code: make claude-code")
    note = tmp_path / "note.txt"
    note.write_text("The king's name is Olaf.\n")
    call = f'<|channel|>commentary to=functions.Read <|constrain|>json<|message|>{{"file_path": "{note}"}}<|call|>'
    answer = "<|channel|>final<|message|>The king is Olaf.<|return|>"
    script = saying(THOUGHT + LOOK + call, answer, name=GPT_OSS)
    service = make(script, name=GPT_OSS, aliases=("claude-*",), max_length=100_000)
    with running(service) as (_, address):
        settings = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path / "home"),
            "ANTHROPIC_BASE_URL": address,
            "ANTHROPIC_API_KEY": "any",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        argv = [CLAUDE_CODE, "-p", "Who is the king?", "--output-format", "json", "--allowedTools", "Read"]
        ran = subprocess.run(
            argv, env=settings, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=120
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads(ran.stdout)["result"] == "The king is Olaf."
    first, last = (request.prompt_ids for request in service.worker.requests)
    assert last[: len(first)] == first  # so that the second turn reads only what is new
    prompt = service.served.text().decode(last[len(first) :], special=True)
    assert prompt.startswith("<|channel|>analysis<|message|>The king is old.<|end|>") and "name is Olaf" in prompt
