"""Whole requests of the routes whose fields are nested, damaged in some places: no answer is a 500."""

import asyncio
import json
import re

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.server.front import app
from gptjax.server.generation.response_store import Item, Stored
from tests.fuzz import rounds
from tests.server.server_material import GPT_OSS, USER, make
from tests.server.test_malformed import NAMES, VALUES

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
BLOCKS = [
    {"type": "thinking", "thinking": "", "signature": "gptjax-1-AAAAAA=="},
    {"type": "text", "text": "Hm.", "citations": None},
    {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": "b"}},
]
RESULT = {"type": "tool_result", "tool_use_id": "call_1", "is_error": True, "content": [{"type": "text", "text": "c"}]}
FOUND = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "tool_reference", "tool_name": "g"}]}
WHOLE = {
    "messages": {
        "model": GPT_OSS,
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            USER,
            {"role": "assistant", "content": BLOCKS},
            {"role": "user", "content": [RESULT, FOUND, {"type": "text", "text": "Go on."}]},
            {"role": "system", "content": "Be brief."},
        ],
        "tools": [
            {"name": "f", "description": "d", "input_schema": SCHEMA, "strict": True},
            {"name": "g", "input_schema": SCHEMA, "defer_loading": True, "type": "custom"},
        ],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": False},
        "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
        "output_config": {"effort": "low", "format": None},
        "metadata": {"user_id": "a"},
        "stop_sequences": ["a"],
        "context_management": {"edits": []},
        "stream": True,
    },
}
WHOLE["messages/count_tokens"] = {
    name: value for name, value in WHOLE["messages"].items() if name not in ("max_tokens", "stop_sequences", "stream")
}
WHOLE["responses"] = {
    "model": GPT_OSS,
    "input": [
        {"type": "item_reference", "id": "msg_1"},
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "a"}]},
        {
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": []}],
            "phase": "commentary",
        },
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "c"}]},
    ],
    "previous_response_id": "resp_1",
    "store": True,
    "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    "top_logprobs": 2,
    "truncation": "auto",
    "max_output_tokens": 5,
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
}


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def harmony():
    return make(name=GPT_OSS)


def damaged(value, data):
    """A copy in which something, somewhere, is another value, or missing, or there twice."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or data.draw(st.integers(0, 9)) == 0:
        return data.draw(VALUES)
    key = data.draw(st.sampled_from(inside))
    other = dict(value) if isinstance(value, dict) else list(value)
    match data.draw(st.sampled_from("deeper deeper deeper remove double rename".split())):
        case "remove":
            del other[key]
        case "double" if isinstance(other, list):
            other.append(other[key])
        case "rename" if isinstance(other, dict):
            other[data.draw(st.text(max_size=4) | NAMES)] = other.pop(key)
        case _:
            other[key] = damaged(other[key], data)
    return other


@pytest.mark.fuzz
@settings(max_examples=rounds(300), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damaged_request_is_a_500(runner, harmony, data):
    route = data.draw(st.sampled_from(sorted(WHOLE)))
    body = WHOLE[route]
    for _ in range(data.draw(st.integers(1, 3))):
        body = damaged(body, data)
    item = Item("msg_1", json.dumps({"type": "message", "id": "msg_1", **USER}).encode())
    harmony.stored.remove("resp_1")
    harmony.stored.add("resp_1", Stored(b"{}", (), (item,), {"msg_1"}))
    query = data.draw(st.dictionaries(st.sampled_from("limit order after stream include".split()), st.text(max_size=4)))
    path = f"/v1/responses/{data.draw(st.sampled_from(['resp_1', 'resp_2', '%00', '%2F']))}"

    async def run():
        transport = httpx2.ASGITransport(app.build(harmony))  # an exception is raised here
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            sent = await client.post(f"/v1/{route}", content=json.dumps(body))
            if route == "responses" and sent.is_success and '"store":true' in sent.text:  # what was stored can be read
                stored = re.search(r"resp_\w{24}", sent.text)[0]
                again = {"input": "a", "previous_response_id": stored, "truncation": "auto"}
                whole = await client.get(f"/v1/responses/{stored}/input_items?limit=100")
                assert [whole.status_code, (await client.post("/v1/responses", json=again)).status_code] == [200, 200]
            method = data.draw(st.sampled_from(["GET", "DELETE"]))
            asked = await client.request(method, path + data.draw(st.sampled_from(["", "/input_items"])), params=query)
            return sent, asked

    for response in runner.run(run()):
        assert response.status_code in (200, 400, 404, 405), response.text
        if response.status_code != 200:
            assert response.json()["error"]["message"]
