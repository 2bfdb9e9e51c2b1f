"""Clients that call tools and want structured answers, real and unchanged. The model's part is scripted.

A tool loop is a call, its result, and an answer. A structured answer is drawn at random among those that the request's
form allows, so the client would notice if that were not what it asked for.
"""

import asyncio
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tests.server.drawn_material import drawing
from tests.server.server_material import GPT_OSS, ids, make, running, tokenizer
from tests.structured.walks import allowed, compiler

# What they warn of is their own affair.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

THOUGHT = "<|channel|>analysis<|message|>The king is old.<|end|><|start|>assistant"
ANSWER = "<|channel|>final<|message|>It was late.<|return|>"
SAID = "It was late."
QUESTION = "Weather in Oslo?"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}}
NODE = Path(sys.prefix) / "node"  # make clients fills these two
CODEX = Path(sys.prefix) / "codex" / "node_modules" / ".bin" / "codex"


def call(name: str, arguments: dict[str, str]) -> str:
    to = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    return f"{to}{json.dumps(arguments)}<|call|>"


def calling(name: str = "weather", **arguments: str):
    """A script: it calls a function, and answers once it has the result."""

    def script(request):
        *_, last, _ = tokenizer(GPT_OSS).decode(request.prompt_ids, special=True).split("<|start|>")
        turn = THOUGHT + (ANSWER if " to=assistant" in last else call(name, arguments or {"city": "Oslo"}))
        if request.grammar is not None:  # some tools are strict
            matcher = compiler(GPT_OSS).matcher(request.grammar, request.stop_ids)
            for token_id in ids(turn, GPT_OSS):
                assert token_id in allowed(matcher, GPT_OSS)
                matcher.take(token_id)
        return ids(turn, GPT_OSS)

    return script


def drawn(request):
    """A script: a turn of the form that is asked for."""
    turns = (list(drawing(GPT_OSS, seed)(request)) for seed in range(100))
    return next(turn for turn in turns if turn[-1] in request.stop_ids)


def address_of(script):
    with running(make(script, name=GPT_OSS, max_length=100_000)) as (_, address):
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def loop():
    """The address of a server whose model calls a tool."""
    yield from address_of(calling())


@pytest.fixture(scope="module")
def forms():
    """The address of a server whose model writes what is asked for."""
    yield from address_of(drawn)


@pytest.fixture(autouse=True)
def collected():
    """What a client leaves open is found here, where it is ignored."""
    yield
    gc.collect()


def asked(address: str) -> dict[str, object]:
    return {"base_url": address, "api_key": "any", "max_retries": 0}


@pytest.fixture(scope="module")
def pet():
    from pydantic import BaseModel, Field

    class Pet(BaseModel):
        name: Literal["Tom", "Rex"]
        age: int = Field(ge=0, le=20)

    return Pet


def weather(city: str) -> str:
    """Of a city."""
    return f"rain in {city}"


@pytest.fixture(scope="module")
def litellm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it looks for prices on the net
        import litellm

        return litellm


@pytest.mark.parametrize("stream", [False, True])
def test_litellm(loop, stream, litellm):
    options = {"model": f"openai/{GPT_OSS}", "api_base": loop, "api_key": "any"}
    messages = [{"role": "user", "content": QUESTION}]
    for _ in range(2):
        for _ in range(2):
            found = litellm.completion(messages=messages, tools=[WEATHER], stream=stream, **options)
            turn = (litellm.stream_chunk_builder(list(found)) if stream else found).choices[0].message
            messages.append(turn.model_dump())
            results = [
                {"role": "tool", "tool_call_id": each.id, "content": weather(**json.loads(each.function.arguments))}
                for each in turn.tool_calls or ()
            ]
            messages += results
        assert (turn.content, turn.reasoning_content) == (SAID, "The king is old.")
        messages.append({"role": "user", "content": QUESTION})


def test_litellm_by_responses(loop, litellm):
    tools = [{"type": "function", **WEATHER["function"]}]
    options = {"model": f"openai/{GPT_OSS}", "api_base": loop, "api_key": "any", "tools": tools}
    turn = litellm.responses(input=QUESTION, **options).output
    items = [{"role": "user", "content": QUESTION}, *(item.model_dump() for item in turn)]
    items.append({"type": "function_call_output", "call_id": turn[-1].call_id, "output": "rain"})
    assert litellm.responses(input=items, **options).output_text == SAID


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(loop, forms, pet, responses):
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    options = {"model": GPT_OSS, "use_responses_api": responses}
    model, of_city = ChatOpenAI(**asked(loop), **options).bind_tools([weather]), tool(weather)
    for streams in (False, True):
        messages = [HumanMessage(QUESTION)]
        for _ in range(2):
            chunks = list(model.stream(messages)) if streams else [model.invoke(messages)]
            turn = chunks[0]
            for chunk in chunks[1:]:
                turn += chunk
            messages += [turn, *map(of_city.invoke, turn.tool_calls)]
        assert turn.text == SAID
    former = ChatOpenAI(**asked(forms), **options)
    for method in ("json_schema", "function_calling"):
        assert isinstance(former.with_structured_output(pet, method=method).invoke("A pet, as JSON."), pet)


@pytest.mark.parametrize("kind", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def test_openais_agents(loop, forms, pet, kind):
    import agents
    import openai

    agents.set_tracing_disabled(True)

    async def run():
        async with openai.AsyncOpenAI(**asked(loop)) as client, openai.AsyncOpenAI(**asked(forms)) as former:
            model = getattr(agents, kind)(model=GPT_OSS, openai_client=client)
            agent = agents.Agent(name="a", instructions="Be kind.", model=model, tools=[agents.function_tool(weather)])
            whole = await agents.Runner.run(agent, QUESTION)
            again = await agents.Runner.run(agent, [*whole.to_input_list(), {"role": "user", "content": QUESTION}])
            streamed = agents.Runner.run_streamed(agent, QUESTION)
            async for _ in streamed.stream_events():
                pass
            model = getattr(agents, kind)(model=GPT_OSS, openai_client=former)
            form = await agents.Runner.run(agents.Agent(name="b", model=model, output_type=pet), "A pet.")
            return whole.final_output, again.final_output, streamed.final_output, form.final_output

    *said, form = asyncio.run(run())
    assert said == [SAID] * 3
    assert isinstance(form, pet)


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(loop, forms, pet, kind):
    import pydantic_ai
    from pydantic_ai.models import openai
    from pydantic_ai.providers.openai import OpenAIProvider

    def model(address):
        return getattr(openai, kind)(GPT_OSS, provider=OpenAIProvider(base_url=address, api_key="any"))

    async def run():
        agent = pydantic_ai.Agent(model(loop), instructions="Be kind.")
        agent.tool_plain(weather)
        whole = await agent.run(QUESTION)
        again = await agent.run(QUESTION, message_history=whole.all_messages())
        async with agent.run_stream(QUESTION) as streamed:
            said = await streamed.get_output()
        forms_ = [pet, pydantic_ai.NativeOutput(pet)]
        made = [(await pydantic_ai.Agent(model(forms), output_type=each).run("A pet.")).output for each in forms_]
        return (whole.output, again.output, said), made

    said, made = asyncio.run(run())
    assert said == (SAID,) * 3
    assert all(isinstance(each, pet) for each in made)


def test_instructor(forms, pet):
    import instructor
    import openai

    with openai.OpenAI(**asked(forms)) as client:
        for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
            asking = instructor.from_openai(client, mode=mode)
            message = {"role": "user", "content": "A pet."}
            made = asking.chat.completions.create(model=GPT_OSS, response_model=pet, messages=[message], max_retries=0)
            assert isinstance(made, pet)


def test_node(loop, forms):
    """The Vercel AI SDK and `runTools` of OpenAI's library for Node.js."""
    if shutil.which("node") is None:
        pytest.skip("there is no Node.js")
    if not (NODE / "node_modules").is_dir():
        pytest.skip(f"make clients fills {NODE}, if there is npm")
    script = Path(__file__).with_name("node") / "clients.mjs"
    command = ["node", "--input-type=module", "-", loop, forms]
    done = subprocess.run(command, input=script.read_text(), cwd=NODE, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found.pop("runTools false"), found.pop("runTools true")) == (SAID, SAID)
    assert found.keys() == {"chat", "responses"}
    for *said, made in found.values():
        assert said == [SAID, 2, SAID, 2]
        assert made["name"] in ("Tom", "Rex") and 0 <= made["age"] <= 20


CODEX_CONFIG = """
model = "{name}"
model_provider = "gptjax"
[model_providers.gptjax]
name = "gptjax"
base_url = "{address}"
wire_api = "responses"
"""


def test_codex(tmp_path):
    """With all the tools that it offers unasked."""
    if not CODEX.exists():
        pytest.skip("make codex installs Codex CLI, which takes 424 MB")
    (tmp_path / "work").mkdir()
    for address in address_of(calling("exec_command", cmd="echo rain > told")):
        (tmp_path / "config.toml").write_text(CODEX_CONFIG.format(name=GPT_OSS, address=address))
        options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        environment = os.environ | {"CODEX_HOME": str(tmp_path)}
        where = {"cwd": tmp_path / "work", "env": environment, "stdin": subprocess.DEVNULL}
        done = subprocess.run([CODEX, "exec", *options, QUESTION], **where, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == SAID
    assert (tmp_path / "work" / "told").read_text() == "rain\n"
