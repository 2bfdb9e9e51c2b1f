"""A model's turns for `/v1/responses`, and ways to ask for them."""

import json

from tests.server.server_material import GPT_OSS, ask, make, post, saying, tokenizer

THOUGHT = "<|channel|>analysis<|message|>The king is old.<|end|><|start|>assistant"
LOOK = "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"
ANSWER = "<|channel|>final<|message|>It was late.<|return|>"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
WEATHER = {"type": "function", "name": "weather", "description": "Of a city.", "parameters": {"type": "object"}}
NAMESPACE = {
    "type": "namespace",
    "name": "files",
    "description": "Of the user.",
    "tools": [
        {"type": "function", "name": "list", "description": "All.", "parameters": {"type": "object"}, "strict": True},
        {"type": "function", "name": "read", "parameters": None},
    ],
}


def talking(text):
    return make(saying(text, name=GPT_OSS), name=GPT_OSS)


def respond(service, **fields):
    return post(service, "/v1/responses", {"input": "Hello"} | fields)


def events(response):
    assert response.headers["content-type"] == "text/event-stream"
    *blocks, end, nothing = response.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(items):
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def prompt_of(service):
    return tokenizer(GPT_OSS).decode(service.worker.requests[-1].prompt_ids, special=True)


def get(service, path, status=200, method="GET"):
    found = ask(service, method, f"/v1/responses/{path}")
    assert found.status_code == status, found.text
    return found.json()


def kept(service, **fields):
    found = respond(service, **fields)
    assert found.status_code == 200, found.text
    return found.json()


def answers(*texts, **more):
    return make(saying(*texts, name=GPT_OSS), name=GPT_OSS, **more)


def outcome(call, output="rain"):
    return {"type": "function_call_output", "call_id": call["call_id"], "output": output}
