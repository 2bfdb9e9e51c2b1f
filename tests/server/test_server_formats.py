"""The chat routes with models that do not speak harmony."""

import json

import pytest

from gptjax.server.openai.responses.input import Input, joined
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import FORMATS, ChatOptions
from tests.server.responses_material import CALL as HARMONY_CALL
from tests.server.responses_material import respond, talking
from tests.server.server_material import USER, chat, events, fault, make, post
from tests.text.chat_material import chat_tokenizer, template, tool

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
HARMONY_CALLS = f"{HARMONY_CALL.replace('<|call|>', '<|end|>')}<|start|>assistant{HARMONY_CALL}"
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Oslo"}}'
FAMILIES = {
    # file: (how the model answers, and how it calls a tool)
    "smollm2": ("It is é😀 late.<|im_end|>", None),
    "qwen2.5": ("It is é😀 late.<|im_end|>", f"{CALL}<|im_end|>"),
    "qwen3": (
        "<think>\nHm, so.\n</think>\n\nIt is é😀 late.<|im_end|>",
        f"<think>\nHm, so.\n</think>\n\n{CALL}<|im_end|>",
    ),
    "hermes-3": ("It is é😀 late.<|im_end|>", None),
    "deepseek-r1": ("<think>\nHm, so.\n</think>\n\nIt is é😀 late.<｜end▁of▁sentence｜>", None),
    "deepseek-r1-thinking": ("Hm, so.\n</think>\n\nIt is é😀 late.<｜end▁of▁sentence｜>", None),
    "llama-2": ("It is é😀 late.</s>", None),
    "llama-3": ("It is é😀 late.<|eot_id|>", None),
    "llama-3.1": ("It is é😀 late.<|eot_id|>", f"{LLAMA_CALL}<|eom_id|>"),
    "llama-3.2": ("It is é😀 late.<|eot_id|>", f"<|python_tag|>{LLAMA_CALL}<|eot_id|>"),
    "mistral-v0.2": ("It is é😀 late.</s>", None),
    "zephyr": ("It is é😀 late.</s>", None),
}
WITH_TOOLS = [file for file, (_, call) in FAMILIES.items() if call]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    return {
        file: chat_tokenizer(tmp_path_factory.mktemp("chat"), chat_template=template(file))
        for file in [*FAMILIES, "qwen3-thinking"]
    }


def saying(tokenizer, text, **more):
    return make(lambda _: tokenizer.encode(text, special=True), text=tokenizer, **more)


def thought(file: str) -> str:
    return "Hm, so." if "Hm, so." in FAMILIES[file][0] else ""


@pytest.mark.parametrize("file", FAMILIES)
def test_chat_completions(tokenizers, file):
    tokenizer = tokenizers[file]
    service = saying(tokenizer, FAMILIES[file][0])
    choice = chat(service).json()["choices"][0]
    reasoning = {"reasoning_content": "Hm, so.", "reasoning": "Hm, so."} if thought(file) else {}
    message = {"role": "assistant", "content": "It is é😀 late.", "refusal": None, **reasoning}
    assert (choice["message"], choice["finish_reason"]) == (message, "stop")
    prompt = FORMATS[file].render([USER], tokenizer, ChatOptions(), max_length=1000)
    assert service.worker.requests[0].prompt_ids == tuple(prompt)
    assert set(FORMATS[file].stop_ids(tokenizer)) <= set(service.worker.requests[0].stop_ids)
    deltas = [chunk["choices"][0]["delta"] for chunk in events(chat(service, stream=True))]
    assert "".join(delta.get("content") or "" for delta in deltas) == "It is é😀 late."
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == thought(file)


@pytest.mark.parametrize("file", WITH_TOOLS)
def test_chat_completions_with_tools(tokenizers, file):
    service = saying(tokenizers[file], FAMILIES[file][1])
    choice = chat(service, tools=[tool("weather")]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    deltas = [chunk["choices"][0]["delta"] for chunk in events(chat(service, tools=[tool("weather")], stream=True))]
    assert not any(delta.get("content") for delta in deltas)
    assert [delta["tool_calls"][0]["function"]["name"] for delta in deltas if "tool_calls" in delta] == ["weather"]
    # The answer and the result go back.
    messages = [USER, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sun"}]
    assert chat(service, messages=messages, tools=[tool("weather")]).status_code == 200
    # Without tools it is text.
    text = chat(service, tool_choice="none", tools=[tool("weather")]).json()["choices"][0]["message"]["content"]
    assert "weather" in text


def test_texts_of_a_message_are_one_text(tokenizers):
    """Servers that cite split them."""
    service = saying(tokenizers["qwen2.5"], "Yes.<|im_end|>")
    texts = [{"type": "text", "text": text} for text in ("A, ", "b.")]
    call = {"type": "tool_use", "id": "c", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "sun"}
    given = [USER, {"role": "assistant", "content": [*texts, call]}, {"role": "user", "content": [result]}]
    tools = [{"name": "weather", "input_schema": {}}]
    assert post(service, "/v1/messages", {"messages": given, "max_tokens": 9, "tools": tools}).status_code == 200
    prompt = tokenizers["qwen2.5"].decode(service.worker.requests[-1].prompt_ids, special=True)
    assert "assistant\nA, b.\n<tool_call>\n" in prompt


def test_a_turn_of_many_parts_is_joined_in_linear_time():
    parts = [{"role": "assistant", "content": None, "tool_calls": [{"id": str(number)}]} for number in range(200_000)]
    whole = joined(Input(parts, ["input"] * len(parts))).messages
    assert [call["id"] for call in whole[0]["tool_calls"]] == [str(number) for number in range(200_000)]
    assert parts[0]["tool_calls"] == [{"id": "0"}]


def test_a_turn_has_one_call_if_that_is_wanted(tokenizers):
    """Models of these formats write several in a row."""
    service = saying(tokenizers["qwen2.5"], f"I look.\n{CALL}\n{CALL}\nAnd so.<|im_end|>")
    flat = {"type": "function", **tool("weather")["function"]}
    for wanted, count in ((None, 2), (True, 2), (False, 1)):
        choice = chat(service, tools=[tool("weather")], parallel_tool_calls=wanted).json()["choices"][0]
        assert (len(choice["message"]["tool_calls"]), choice["finish_reason"]) == (count, "tool_calls")
        assert choice["message"]["content"] == ("I look." if count == 1 else "I look.\nAnd so.")
        body = respond(service, tools=[flat], parallel_tool_calls=wanted).json()
        assert [item["type"] for item in body["output"]].count("function_call") == count
        assert body["parallel_tool_calls"] is (count == 2)
        asked = {"messages": [USER], "max_tokens": 100, "tools": [{"name": "weather", "input_schema": {}}]}
        asked["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": wanted is False}
        blocks = post(service, "/v1/messages", asked).json()["content"]
        assert [block["type"] for block in blocks].count("tool_use") == count
        muddled = chat(talking(HARMONY_CALLS), tools=[tool("weather")], parallel_tool_calls=wanted).json()
        assert len(muddled["choices"][0]["message"]["tool_calls"]) == count


@pytest.mark.parametrize("file", FAMILIES)
def test_responses(tokenizers, file):
    body = respond(saying(tokenizers[file], FAMILIES[file][0])).json()
    assert body["status"] == "completed"
    items = {item["type"]: item["content"][0]["text"] for item in body["output"]}
    assert items == {"message": "It is é😀 late."} | ({"reasoning": "Hm, so."} if thought(file) else {})
    assert body["reasoning"] == {"effort": None, "summary": None}


@pytest.mark.parametrize("file", WITH_TOOLS)
def test_a_turn_that_responses_gave_goes_back_as_one_message(tokenizers, file):
    tokenizer = tokenizers[file]
    service = saying(tokenizer, FAMILIES[file][1])
    flat = {"type": "function", **tool("weather")["function"]}
    output = respond(service, tools=[flat]).json()["output"]
    assert [item["type"] for item in output] == ["reasoning", "function_call"][not thought(file) :]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "sun"}
    given = [{"type": "message", **USER}, *output, result]
    assert respond(service, input=given, tools=[flat]).status_code == 200
    prompt = tokenizer.decode(service.worker.requests[-1].prompt_ids, special=True)
    turn = FAMILIES[file][1].replace("<|eom_id|>", "<|eot_id|>").removeprefix("<|python_tag|>")
    assert prompt.count("assistant\n") + prompt.count("assistant<|end_header_id|>\n") == 2
    assert f"\n{turn}" in prompt


def test_a_turns_parts_are_joined_in_their_order(tokenizers):
    def item(kind, **more):
        return {"type": kind, **more}

    def call(number):
        return item("function_call", call_id=f"c{number}", name="f", arguments="{}")

    def said(text):
        return item("message", role="assistant", content=text)

    reasoning = item("reasoning", content=[{"type": "reasoning_text", "text": "Hm."}])
    results = [item("function_call_output", call_id=f"c{number}", output="x") for number in (1, 2)]
    service = saying(tokenizers["qwen3"], FAMILIES["qwen3"][0])
    given = [
        {"type": "message", **USER},
        reasoning,
        said("I look."),
        call(1),
        call(2),
        *results,
        said("A."),
        said("B."),
    ]
    assert respond(service, input=given).status_code == 200
    prompt = tokenizers["qwen3"].decode(service.worker.requests[-1].prompt_ids, special=True)
    calls = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert f"assistant\n<think>\nHm.\n</think>\n\nI look.\n{calls}\n{calls}<|im_end|>" in prompt
    assert "<|im_start|>assistant\nA.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nB.<|im_end|>" in prompt


def test_thinking_is_turned_off_as_in_vllm(tokenizers):
    service = saying(tokenizers["qwen3"], "Yes.<|im_end|>")
    for route in (chat, respond):
        for wanted in (True, False, None):
            kwargs = {} if wanted is None else {"enable_thinking": wanted}
            assert route(service, chat_template_kwargs=kwargs).status_code == 200
            prompt = tokenizers["qwen3"].decode(service.worker.requests[-1].prompt_ids, special=True)
            assert prompt.endswith("</think>\n\n") == (wanted is False)
        for given, says in (
            ({"enable_thinking": 1}, "true or false"),
            ({"thinking": True}, "'chat_template_kwargs.thinking'"),
            ([], "an object"),
        ):
            assert says.replace("'", '"') in fault(route(service, chat_template_kwargs=given))["message"].replace(
                "'", '"'
            )
    other = saying(tokenizers["smollm2"], "Yes.<|im_end|>")
    error = fault(chat(other, chat_template_kwargs={"enable_thinking": False}))
    assert "enable_thinking has no meaning in the chat format smollm2" in error["message"]
    assert error["param"] == "enable_thinking"


def test_an_effort_is_refused_where_it_has_no_meaning(tokenizers):
    service = saying(tokenizers["qwen3"], "Yes.<|im_end|>")
    error = fault(chat(service, reasoning_effort="low"))
    assert (error["param"], "no meaning in the chat format qwen3" in error["message"]) == ("reasoning_effort", True)
    assert fault(respond(service, reasoning={"effort": "low"}))["param"] == "reasoning.effort"


def test_tools_are_refused_where_there_are_none(tokenizers):
    error = fault(chat(saying(tokenizers["smollm2"], "Yes.<|im_end|>"), tools=[tool("weather")]))
    assert (error["param"], "no meaning in the chat format smollm2" in error["message"]) == ("tools", True)


def test_tags_and_calls_count_as_neither_reasoning_nor_answer(tokenizers):
    tokenizer = tokenizers["qwen3"]
    text = f"<think>\nHm, so.\n</think>\n\nI look.\n{CALL}<|im_end|>"
    body = chat(saying(tokenizer, text), tools=[tool("weather")], logprobs=True).json()
    tokens = [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]]
    assert "".join(tokens) == "I look."
    reasoning = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert reasoning == len(tokenizer.encode("Hm, so."))
    assert body["usage"]["completion_tokens"] == len(tokenizer.encode(text, special=True))


def test_a_prompt_that_begins_the_thought(tokenizers):
    body = chat(saying(tokenizers["qwen3-thinking"], "Hm, so.\n</think>\n\nYes.<|im_end|>")).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm, so.", "Yes.")


def test_an_unknown_template_is_not_a_chat_model(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, chat_template="{{ messages }}")
    for route in (chat, respond):
        error = fault(route(saying(tokenizer, "Yes.<|im_end|>")))
        assert (error["code"], error["param"]) == ("model_not_chat", "model")
        assert "/v1/completions" in error["message"]
        assert "--chat-format" in error["message"]


def test_anthropics_api(tokenizers):
    """A turn of the assistant's is one message; thinking can be switched off; an effort means nothing here."""
    tokenizer = tokenizers["qwen3"]
    service = saying(tokenizer, FAMILIES["qwen3"][1])
    weather = {"name": "weather", "input_schema": tool("weather")["function"]["parameters"]}
    body = {"messages": [USER], "max_tokens": 99, "tools": [weather], "thinking": {"type": "enabled"}}
    answer = post(service, "/v1/messages", body | {"output_config": {"effort": "high"}}).json()
    thinking, call = answer["content"]
    assert (thinking["thinking"], call["input"]) == ("Hm, so.", {"city": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "rain"}
    body["messages"] = [
        USER,
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [result]},
    ]
    post(service, "/v1/messages", body | {"thinking": {"type": "disabled"}})
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    calls = [{"id": call["id"], "type": "function", "function": function}]
    turn = {"role": "assistant", "reasoning_content": "Hm, so.", "content": None, "tool_calls": calls}
    messages = [USER, turn, {"role": "tool", "tool_call_id": call["id"], "content": "rain"}]
    options = ChatOptions(tools=[tool("weather")], enable_thinking=False)
    expected = FORMATS["qwen3"].render(messages, tokenizer, options, max_length=1000)
    assert list(service.worker.requests[-1].prompt_ids) == expected
