"""OpenAI's own Python library, unchanged, against the server on a socket."""

import contextlib

import pytest

from gptjax.server.ipc.events import Failed
from tests.server.server_material import GPT_OSS, USER, endless, ids, make, running, saying

pytestmark = pytest.mark.clients

TURN = (
    "<|channel|>analysis<|message|>The king is old.<|end|><|start|>assistant"
    "<|channel|>final<|message|>It was late.<|return|>"
)
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def ask():
    """Makes a client of a server with a script."""

    import openai

    with contextlib.ExitStack() as stack:

        def start(script, name=GPT_OSS):
            service = make(script, name=name)
            _, address = stack.enter_context(running(service))
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60)
            return service, stack.enter_context(client)

        yield start


def test_models(ask):
    _, client = ask(endless)
    assert [model.id for model in client.models.list()] == [GPT_OSS]
    assert client.models.retrieve(GPT_OSS).owned_by == "gptjax"


def test_completions(ask):
    _, client = ask(saying(" there was<|endoftext|>"), "gpt2-tales")
    fields = {"model": "gpt2-tales", "prompt": ["Once upon a time", "The"], "logprobs": 1, "echo": True}
    whole = client.completions.create(**fields)
    assert [choice.text for choice in whole.choices] == ["Once upon a time there was", "The there was"]
    assert whole.choices[1].logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    texts = ["", ""]
    for chunk in client.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_chat(ask):
    _, client = ask(saying(TURN, name=GPT_OSS))
    turn = client.chat.completions.create(model=GPT_OSS, messages=[USER], logprobs=True, reasoning_effort="low")
    assert turn.choices[0].message.content == "It was late."
    assert turn.choices[0].message.reasoning_content == turn.choices[0].message.reasoning == "The king is old."
    assert "".join(entry.token for entry in turn.choices[0].logprobs.content) == "It was late."
    assert turn.usage.completion_tokens_details.reasoning_tokens > 0


def test_tokens_that_come_eight_at_a_time(ask):
    tokens = ids(TURN, GPT_OSS)
    _, client = ask(lambda _: [tokens[start : start + 8] for start in range(0, len(tokens), 8)])
    asked = {"model": GPT_OSS, "messages": [USER], "stream": True, "logprobs": True}
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**asked)]
    assert "".join(choice.delta.content or "" for choice in choices) == "It was late."
    assert "".join(getattr(choice.delta, "reasoning", None) or "" for choice in choices) == "The king is old."
    entries = [entry.token for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert "".join(entries) == "It was late." and len(entries) == len(ids("It was late.", GPT_OSS))
    assert choices[-1].finish_reason == "stop"
    (*_, last) = client.responses.create(model=GPT_OSS, input="Hello", stream=True)
    assert last.response.output_text == "It was late."
    assert last.response.usage.output_tokens == len(tokens)


def test_a_chat_is_streamed(ask):
    _, client = ask(saying(TURN, name=GPT_OSS))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(model=GPT_OSS, messages=[USER], **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "It was late."
    assert (chunks[-1].choices[0].finish_reason, last.choices, last.usage.prompt_tokens > 0) == ("stop", [], True)
    with client.chat.completions.stream(model=GPT_OSS, messages=[USER]) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "It was late."


def test_tools(ask):
    _, client = ask(saying(CALL, TURN, CALL, name=GPT_OSS))
    turn = client.chat.completions.create(model=GPT_OSS, messages=[USER], tools=[WEATHER])
    (call,) = turn.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [USER, turn.choices[0].message.model_dump(), result]
    turn = client.chat.completions.create(model=GPT_OSS, messages=messages, tools=[WEATHER])
    assert turn.choices[0].message.content == "It was late."
    chunks = client.chat.completions.create(model=GPT_OSS, messages=[USER], tools=[WEATHER], stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert "".join(delta.tool_calls[0].function.arguments for delta in deltas) == '{"city": "Oslo"}'


def test_errors(ask):
    import openai

    service, client = ask(lambda request: [*[5], Failed("it broke", "not_finite")])
    with pytest.raises(openai.BadRequestError, match="temperature must be") as bad:
        client.chat.completions.create(model=GPT_OSS, messages=[USER], temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt-5'"):
        client.chat.completions.create(model="gpt-5", messages=[USER])
    with pytest.raises(openai.InternalServerError, match="it broke"):
        client.chat.completions.create(model=GPT_OSS, messages=[USER])
    with pytest.raises(openai.APIError, match="it broke"):
        list(client.chat.completions.create(model=GPT_OSS, messages=[USER], stream=True))
    with pytest.raises(openai.APIError, match="it broke"):
        list(client.responses.create(model=GPT_OSS, input="Hello", stream=True))
    with pytest.raises(openai.APIError, match="it broke"):
        list(client.completions.create(model=GPT_OSS, prompt="Hello", stream=True))
    service.worker.room = 0
    with pytest.raises(openai.RateLimitError, match="try again in 3 s"):
        client.chat.completions.create(model=GPT_OSS, messages=[USER])


def test_langchain_is_told_of_an_error_in_a_stream(ask):
    from langchain_openai import ChatOpenAI

    _, client = ask(lambda request: [*[5], Failed("it broke", "not_finite")])
    options = {"base_url": str(client.base_url), "api_key": "any", "model": GPT_OSS, "max_retries": 0}
    for responses in (True, False):
        with pytest.raises(Exception, match="it broke"):
            list(ChatOpenAI(**options, use_responses_api=responses).stream("Hello"))


def test_request_ids(ask):
    _, client = ask(saying(TURN, name=GPT_OSS))
    turn = client.chat.completions.create(model=GPT_OSS, messages=[USER], extra_headers={"x-request-id": "mine"})
    assert turn._request_id == "mine"
    assert client.responses.create(model=GPT_OSS, input="Hello")._request_id.startswith("req_")


def test_a_full_queue_is_tried_again(ask):
    service, client = ask(saying(TURN, name=GPT_OSS))
    check_room, tries = service.worker.check_room, []

    def first_full(ahead):
        tries.append(None)
        service.worker.room = 0 if len(tries) == 1 else 64
        check_room(ahead)

    service.worker.check_room = first_full
    turn = client.with_options(max_retries=2).chat.completions.create(model=GPT_OSS, messages=[USER])
    assert (turn.choices[0].message.content, len(service.worker.requests)) == ("It was late.", 1)


def test_responses(ask):
    _, client = ask(saying(TURN, CALL, TURN, name=GPT_OSS))
    response = client.responses.create(model=GPT_OSS, input="Hello", reasoning={"effort": "low"})
    assert (response.status, response.output_text) == ("completed", "It was late.")
    assert response.output[0].content[0].text == "The king is old."
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}
    response = client.responses.create(model=GPT_OSS, input="Hello", tools=[tool])
    call = response.output[-1]
    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city": "Oslo"}')
    said = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in response.output)]
    said.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    assert client.responses.create(model=GPT_OSS, input=said, tools=[tool]).output_text == "It was late."


def test_responses_are_streamed(ask):
    _, client = ask(saying(TURN, name=GPT_OSS))
    with client.responses.stream(model=GPT_OSS, input="Hello") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "It was late."
    assert "response.reasoning_text.delta" in kinds
    events = list(client.responses.create(model=GPT_OSS, input="Hello", stream=True))
    assert events[-1].response.output_text == "It was late."


def test_responses_are_remembered(ask):
    import openai

    service, client = ask(saying(TURN, name=GPT_OSS))
    with client.responses.create(model=GPT_OSS, input="Hello", stream=True) as stream:
        first = list(stream)[-1].response
    assert first.store
    second = client.responses.create(model=GPT_OSS, input="And then?", previous_response_id=first.id)
    assert client.responses.retrieve(second.id) == second
    items = client.responses.input_items.list(second.id, order="asc", limit=2)
    assert [item.type for item in items] == ["message", "reasoning", "message", "message"]  # from two pages
    prompts = [service.served.text().decode(request.prompt_ids) for request in service.worker.requests]
    assert "Hello" in prompts[1] and "It was late." in prompts[1] and "And then?" in prompts[1]
    client.responses.delete(first.id)
    for gone in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match=f"response with id '{first.id}' not found"):
            gone(first.id)
    with pytest.raises(openai.BadRequestError) as found:
        client.responses.create(model=GPT_OSS, input="And then?", previous_response_id=first.id)
    assert found.value.code == "previous_response_not_found"
