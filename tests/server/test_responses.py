"""`/v1/responses`."""

import json

import pytest

from tests.server.responses_material import (
    ANSWER,
    CALL,
    LOOK,
    THOUGHT,
    WEATHER,
    events,
    kept,
    respond,
    talking,
    without_ids,
)
from tests.server.server_material import GPT_OSS, chat, fault, ids, make, tokenizer


def test_reasoning_and_answer_are_items():
    service = talking(THOUGHT + ANSWER)
    body = respond(service, instructions="Be kind.", reasoning={"effort": "low"}, max_output_tokens=99).json()
    assert (body["object"], body["status"], body["store"]) == ("response", "completed", True)
    part = {"type": "output_text", "text": "It was late.", "annotations": [], "logprobs": []}
    assert without_ids(body["output"]) == [
        {
            "type": "reasoning",
            "summary": [],
            "status": "completed",
            "content": [{"type": "reasoning_text", "text": "The king is old."}],
        },
        {
            "type": "message",
            "role": "assistant",
            "phase": "final_answer",
            "status": "completed",
            "content": [part],
        },
    ]
    assert body["usage"]["output_tokens"] == len(ids(THOUGHT + ANSWER, GPT_OSS))
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    prompt = tokenizer(GPT_OSS).decode(service.worker.requests[0].prompt_ids)
    assert "Be kind." in prompt and "Reasoning: low" in prompt


def test_a_stream_tells_of_every_item():
    found = events(respond(talking(THOUGHT + ANSWER), stream=True))
    kinds = [event["type"].removeprefix("response.") for event in found]
    distinct = [kind for at, kind in enumerate(kinds) if at == 0 or kinds[at - 1] != kind]
    begun, ended = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
    parts = [[*begun, f"{text}.delta", f"{text}.done", *ended] for text in ("reasoning_text", "output_text")]
    assert distinct == ["created", "in_progress", *parts[0], *parts[1], "completed"]
    text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert text == "It was late."
    whole = found[-1]["response"]
    assert without_ids(whole["output"]) == without_ids(respond(talking(THOUGHT + ANSWER)).json()["output"])
    assert [event["item"] for event in found if event["type"] == "response.output_item.done"] == whole["output"]


def test_a_call_and_its_result():
    service = talking(THOUGHT + CALL)
    body = respond(service, tools=[WEATHER]).json()
    call = body["output"][-1]
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert call["arguments"] == '{"city": "Oslo"}'
    service = talking(ANSWER)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    said = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}, *body["output"], result]
    assert respond(service, input=said, tools=[WEATHER]).status_code == 200
    prompt = tokenizer(GPT_OSS).decode(service.worker.requests[0].prompt_ids)
    assert "The king is old." in prompt and "rain" in prompt
    twice = CALL.replace("<|call|>", "<|end|>") + "<|start|>assistant" + CALL
    streamed = events(respond(talking(twice), tools=[WEATHER], stream=True))
    done = [event["item"] for event in streamed if event["type"] == "response.output_item.done"]
    assert done == streamed[-1]["response"]["output"]
    assert [item["status"] for item in done] == ["completed"] * 2
    for place, item in enumerate(done):
        added, *written, whole, _ = [event for event in streamed if event.get("output_index") == place]
        assert added["item"] == {**item, "arguments": "", "status": "in_progress"}
        assert {event["type"] for event in written} == {"response.function_call_arguments.delta"}
        assert len(written) > 2  # as the model writes them
        assert "".join(event["delta"] for event in written) == whole["arguments"] == item["arguments"]
        assert whole["type"] == "response.function_call_arguments.done"


def test_a_call_that_is_cut_short():
    (item,) = respond(talking(CALL), tools=[WEATHER], max_output_tokens=20).json()["output"]
    assert item["status"] == "incomplete"
    assert '{"city": "Oslo"}'.startswith(item["arguments"])


def test_a_turn_that_is_cut_short():
    found = events(respond(talking(THOUGHT + ANSWER), max_output_tokens=5, stream=True))
    assert found[-1]["type"] == "response.incomplete"
    assert found[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    "fields",
    [
        {"input": None},
        {"input": []},
        {"input": [3]},
        {"input": [{"role": "wizard", "content": "a"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": 3}]}]},
        {"input": [{"role": "user", "content": {}}]},
        {"input": [{"type": "web_search_call"}]},
        {"input": [{"type": []}]},
        {"input": [{"type": "function_call_output", "call_id": "x", "output": "a"}]},
        {"input": [{"type": "function_call", "call_id": {}, "name": "f", "arguments": "{}"}]},
        {"input": "\ud800"},
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"truncation": "some"},
        {"store": "yes"},
        {"text": {"format": {"type": "json_schema"}}},
        {"text": {"format": {"type": "json"}}},
        {"text": 3},
        {"text": "json"},
        {"text": {"form": {"type": "text"}}},
        {"reasoning": "high"},
        {"reasoning": {"effort": "enormous"}},
        {"reasoning": {"depth": 3}},
        {"tools": {}},
        {"tools": [{"type": "file_search"}]},
        {"tools": ["f"]},
        {"tools": [{"type": "function", "name": 3}]},
        {"tool_choice": "required"},
        {"max_output_tokens": 0},
        {"messages": []},
        {"n": 2},
    ],
)
def test_what_is_not_as_it_should_be(fields):
    fault(respond(talking(ANSWER), **fields))


def test_plain_models_refuse():
    assert fault(respond(make()))["code"] == "model_not_chat"


LOGPROBS = "message.output_text.logprobs"


def test_log_probabilities_are_those_of_chat():
    text = THOUGHT + LOOK + THOUGHT + ANSWER
    fields = {"include": [LOGPROBS], "top_logprobs": 2}
    body = kept(talking(text), **fields)
    assert body["top_logprobs"] == 2
    parts = [item["content"][0] for item in body["output"] if item["type"] == "message"]
    entries = [entry for part in parts for entry in part["logprobs"]]
    in_chat = chat(talking(text), logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert entries == in_chat and entries[0]["top_logprobs"][1]["logprob"] == -1.5
    found = events(respond(talking(text), stream=True, **fields))
    deltas = [entry for event in found if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    done = [entry for event in found if event["type"] == "response.output_text.done" for entry in event["logprobs"]]
    assert deltas == done == in_chat
    assert json.dumps(found[-1]["response"]["output"]).count('"token"') == 3 * len(in_chat)
    assert [part["logprobs"] for part in parts if not part["logprobs"]] == []
    plain = kept(talking(text), include=[LOGPROBS])["output"][-1]["content"][0]["logprobs"]
    assert all(entry["top_logprobs"] == [] for entry in plain) and len(plain) == len(parts[-1]["logprobs"])
