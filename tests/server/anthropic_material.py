"""Conversations in the form of `/v1/messages`, and ways to ask for answers."""

import json

from gptjax.server.openai.responses.encrypted import encrypted
from tests.server.responses_material import talking
from tests.server.server_material import USER, post

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
SIGNED = {"type": "thinking", "thinking": "The king is old.", "signature": encrypted("The king is old.")}


def text(words, **more):
    return {"type": "text", "text": words, **more}


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def message(service, **fields):
    return post(service, "/v1/messages", {"messages": [USER], "max_tokens": 100} | fields)


def said(answer, **fields):
    found = message(talking(answer), **fields)
    assert found.status_code == 200, found.text
    return found.json()


def events(response):
    assert response.headers["content-type"] == "text/event-stream"
    *parts, nothing = response.text.split("\n\n")
    assert nothing == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def fault(response, status=400):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert set(body["error"]) == {"type", "message"}
    return body["error"]["type"], body["error"]["message"]


def result(content, **more):
    return {"type": "tool_result", "tool_use_id": "call_x", "content": content, **more}


def used(call_id="call_x", **given):
    return {"type": "tool_use", "id": call_id, "name": "weather", "input": given}
