"""OpenAI's chat form as harmony messages; `tests/oracle` compares the mapping with openai-harmony's classes."""

from typing import Any

import pytest

from gptjax.text.harmony import (
    BROWSER,
    PYTHON,
    DeveloperContent,
    Function,
    Message,
    Namespace,
    SystemContent,
    conversation,
    render,
)
from tests.text.harmony_material import TALES, USER, call, function, ids, parts

JSON = "<|constrain|>json"
SYSTEM = Message("system", SystemContent())
HI = Message("user", "Hi.")


def says(text: str, channel: str = "final") -> Message:
    return Message("assistant", text, channel=channel)


def test_the_whole_prompt() -> None:
    prompt = render(
        [{"role": "system", "content": "Be brief."}, USER],
        TALES,
        [function("f", description="Does.", parameters={"type": "object", "properties": {}})],
        reasoning_effort="low",
        current_date="2025-06-28",
    )
    assert prompt == ids(
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: low\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.\n"
        "Calls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\n"
        "namespace functions {\n\n// Does.\ntype f = (_: {\n}) => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>Hi.<|end|><|start|>assistant"
    )


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], [HI]),
        ([{"role": "user", "content": "", "name": "ann"}], [Message("user", "", "ann")]),
        ([{"role": "user", "content": parts("H", "", "i.")}], [HI]),
        ([{"role": "user", "content": []}], [Message("user", "")]),
        ([USER, {"role": "assistant", "content": "A"}], [HI, Message("assistant", "A", channel="final")]),
        ([USER, {"role": "assistant", "content": ""}], [HI, Message("assistant", "", channel="final")]),
        # Nothing was said.
        ([USER, {"role": "assistant"}], [HI]),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], [HI]),
        ([USER, {"role": "assistant", "content": None, "reasoning_content": ""}], [HI]),
        ([USER, {"role": "assistant", "content": "", "reasoning_content": ""}], [HI]),
        (
            [USER, {"role": "assistant", "content": None, "refusal": "I cannot."}],
            [HI, Message("assistant", "I cannot.", channel="final")],
        ),
        (
            [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I "}, *parts("cannot.")]}],
            [HI, Message("assistant", "I cannot.", channel="final")],
        ),
        (
            [USER, {"role": "assistant", "content": "A", "refusal": "B"}],
            [HI, Message("assistant", "A", channel="final")],
        ),
        (
            [USER, {"role": "assistant", "content": "I look.", "phase": "commentary"}],
            [HI, Message("assistant", "I look.", channel="commentary")],
        ),
        (
            [USER, {"role": "assistant", "content": "A", "phase": "final_answer", "tool_calls": [call()]}],
            [
                HI,
                Message("assistant", "A", channel="final"),
                Message("assistant", "{}", None, "commentary", "functions.f", JSON),
            ],
        ),
        ([{**USER, "id": "msg_1"}, {"role": "assistant", "content": "A", "phase": None}], [HI, says("A")]),
        (
            [USER, {"role": "assistant", "content": "A", "reasoning_content": "R", "name": "bob"}],
            [HI, Message("assistant", "R", "bob", "analysis"), Message("assistant", "A", "bob", "final")],
        ),
        (
            [USER, {"role": "assistant", "content": None, "reasoning": "R"}],
            [HI, Message("assistant", "R", channel="analysis")],
        ),
        (
            [USER, {"role": "assistant", "content": "A", "reasoning": "R", "reasoning_content": "R"}],
            [HI, Message("assistant", "R", channel="analysis"), Message("assistant", "A", channel="final")],
        ),
        (
            [USER, {"role": "assistant", "content": "A", "reasoning": "", "tool_calls": [], "refusal": None}],
            [HI, Message("assistant", "A", channel="final")],
        ),
        (
            [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [call("f", '{"a": 1}', "1"), call("g", "", "2")]},
                {"role": "tool", "tool_call_id": "2", "content": "no"},
                {"role": "tool", "tool_call_id": "1", "content": parts("y", "es")},
            ],
            [
                HI,
                Message("assistant", '{"a": 1}', None, "commentary", "functions.f", JSON),
                Message("assistant", "", None, "commentary", "functions.g", JSON),
                Message("tool", "no", "functions.g", "commentary", "assistant"),
                Message("tool", "yes", "functions.f", "commentary", "assistant"),
            ],
        ),
        (
            [USER, {"role": "assistant", "content": "I look.", "reasoning_content": "R", "tool_calls": [call()]}],
            [
                HI,
                Message("assistant", "R", channel="analysis"),
                Message("assistant", "I look.", channel="commentary"),
                Message("assistant", "{}", None, "commentary", "functions.f", JSON),
            ],
        ),
        (
            [{"role": "system", "content": "A"}, {"role": "developer", "content": parts("B", "C")}, USER],
            [Message("developer", DeveloperContent("A\n\nBC")), HI],
        ),
        ([{"role": "system", "content": ""}, USER, {"role": "system", "content": ""}], [HI]),
        ([USER, {"role": "system", "content": "A"}], [HI, Message("developer", DeveloperContent("A"))]),
    ],
)
def test_messages(messages: list[dict[str, Any]], expected: list[Message]) -> None:
    assert conversation(messages) == [SYSTEM, *expected]


def test_an_id_may_be_used_again() -> None:
    """Some clients count the calls of each turn from one."""
    turns = [
        message
        for name in ("f", "g")
        for message in (
            USER,
            {"role": "assistant", "tool_calls": [call(name)]},
            {"role": "tool", "tool_call_id": "1", "content": name},
        )
    ]
    assert [message.name for message in conversation(turns) if message.role == "tool"] == ["functions.f", "functions.g"]


def test_functions_without_instructions() -> None:
    tools = [function("f", description=None, parameters=None, strict=True), function("g", parameters={})]
    members = (Function("f"), Function("g", "", {}))
    developer = Message("developer", DeveloperContent(None, (Namespace("functions", None, members),)))
    assert conversation([USER], tools) == [SYSTEM, developer, HI]
    assert conversation([USER], None) == conversation((USER,), ()) == [SYSTEM, HI]  # type: ignore[arg-type]


def test_builtin_tools() -> None:
    tools = [{"type": "python"}, {"type": "browser"}, {"type": "python"}]
    calls = [call("python", "print(1)", "a"), call("browser.search", "{}", "b"), call("browser.buy", "{}", "c")]
    messages = [
        USER,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    assert conversation(messages, tools, "high", "2025-06-28") == [
        Message("system", SystemContent(current_date="2025-06-28", reasoning_effort="high", tools=(PYTHON, BROWSER))),
        HI,
        Message("assistant", "print(1)", None, "analysis", "python", "code"),
        Message("assistant", "{}", None, "analysis", "browser.search", "code"),
        Message("assistant", "{}", None, "commentary", "functions.browser.buy", JSON),
        Message("tool", "1", "python", "analysis", "assistant"),
    ]
    assert conversation(messages)[2].recipient == "functions.python"


def test_a_finished_turn_goes_back_with_end() -> None:
    answer = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    prompt = TALES.decode(render([USER, answer, USER], TALES), special=True)
    assert "<|return|>" not in prompt
    assert prompt.endswith(
        "Hi.<|end|><|start|>assistant<|channel|>final<|message|>A<|end|><|start|>user<|message|>Hi.<|end|><|start|>assistant"
    )


def turns() -> list[list[dict[str, Any]]]:
    """Four prompts' messages: two turns of which the second calls a tool, and the first prompt of a third."""
    talk = [{"role": "system", "content": "Be brief."}, USER]
    prompts = [list(talk)]
    talk += [{"role": "assistant", "reasoning_content": "Thought one.", "content": "One."}, USER]
    prompts.append(list(talk))
    talk += [{"role": "assistant", "reasoning_content": "Thought two.", "tool_calls": [call()]}]
    talk += [{"role": "tool", "tool_call_id": "1", "content": "rain"}]
    prompts.append(list(talk))
    talk += [{"role": "assistant", "reasoning_content": "Thought three.", "content": "Two."}, USER]
    return [*prompts, talk]


@pytest.mark.parametrize(
    ("earlier", "thoughts", "shared"),
    [
        # The guide's, the template's and vLLM's: a prompt goes on from the one before for as long as the turn does.
        ("dropped", ["", "", "two", ""], ["user 1", "whole", "user 2"]),
        # Turn 1's reasoning comes back with the call, and goes with the answer; turn 2's never does.
        ("openai-harmony", ["", "", "one two", "two three"], ["user 1", "user 1", "user 1"]),
        ("kept", ["", "one", "one two", "one two three"], ["whole", "whole", "whole"]),
    ],
)
def test_what_successive_prompts_share(earlier: Any, thoughts: list[str], shared: list[str]) -> None:
    prompts = [render(messages, TALES, [function()], earlier_analysis=earlier) for messages in turns()]
    for prompt, expected in zip(prompts, thoughts, strict=True):
        text = TALES.decode(prompt)
        assert [word for word in ("one", "two", "three") if f"Thought {word}." in text] == expected.split()
    user = TALES.encode("<|start|>user<|message|>Hi.<|end|><|start|>assistant", special=True)
    for before, after, until in zip(prompts, prompts[1:], shared, strict=False):
        common = (
            next(n for n, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1])
            if (before != after[: len(before)])
            else len(before)
        )
        begin = {"whole": len(before)}
        ends = [at + len(user) for at in range(len(before)) if before[at : at + len(user)] == user]
        begin |= {f"user {number}": end for number, end in enumerate(ends, 1)}
        # Both go on with <|channel|>, of another channel.
        assert common - begin[until] in (0, 1), (common, begin, until)
