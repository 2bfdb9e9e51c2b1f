"""OpenAI's chat form as harmony messages; `tests/oracle` compares the mapping with openai-harmony's classes."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import RequestError
from gptjax.text.fields import _KEYS
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
from tests.fuzz import rounds
from tests.text.harmony_material import TALES, USER, call, function, ids

JSON = "<|constrain|>json"
SYSTEM = Message("system", SystemContent())
HI = Message("user", "Hi.")


def says(text: str, channel: str = "final") -> Message:
    return Message("assistant", text, channel=channel)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


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


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no message with the role user"),
        ([{"role": "system", "content": "A"}], "no message with the role user"),
        ("Hi.", "messages is 'Hi.'; expected a list"),
        ([USER, "Hi."], r"messages\[1\] is 'Hi.'; expected an object"),
        ([USER, {"content": "A"}], r"messages\[1\] has the role None; expected one of system, "),
        ([{"role": "function", "content": "A"}], r"messages\[0\] has the role 'function'"),
        ([{"role": ["user"], "content": "A"}], r"messages\[0\] has the role \['user'\]"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "system", "content": None}, USER], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content is 3; expected a string or a list of text parts"),
        ([{"role": "user", "content": {"type": "text", "text": "A"}}], r"messages\[0\].content is {"),
        ([{"role": "user", "content": ["A"]}], r"messages\[0\].content\[0\] is 'A'; expected an object"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text is missing"),
        (
            [{"role": "user", "content": [*parts("A"), {"type": "image_url", "image_url": {"url": "x"}}]}],
            r"messages\[0\].content\[1\] is of the type 'image_url': the model reads only text",
        ),
        ([{"role": "user", "content": [{"text": "A"}]}], "is of the type missing"),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\].content has a lone surrogate"),
        ([{"role": "user", "content": parts("\udfff")}], r"content\[0\].text has a lone surrogate"),
        ([{"role": "user", "content": "A", "name": "two words"}], r"messages\[0\].name is 'two words'"),
        ([{"role": "user", "content": "A", "name": 3}], r"messages\[0\].name is 3"),
        ([{"role": "user", "content": "A", "name": "<|end|>"}], r"messages\[0\].name is '<\|end\|>'"),
        (
            [{**USER, "tool_calls": [1]}],
            r"messages\[0\] has 'tool_calls', which has no meaning here; expected role, con",
        ),
        ([{**USER, "tool_calls": "abc"}], r"messages\[0\] has 'tool_calls'"),
        ([{**USER, "tool_calls": 5}], r"messages\[0\] has 'tool_calls'"),
        ([{"role": "system", "content": "A", "tool_calls": [call()]}, USER], r"messages\[0\] has 'tool_calls'"),
        ([{**USER, "reasoning_content": "R"}], r"messages\[0\] has 'reasoning_content'"),
        ([{**USER, "tool_call_id": "1"}], r"messages\[0\] has 'tool_call_id'"),
        ([{**USER, "refusal": "No."}], r"messages\[0\] has 'refusal'"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}], "is of the type 'refusal'"),
        ([USER, {"role": "assistant", "refusal": 3}], r"messages\[1\].refusal is 3; expected a string"),
        ([USER, {"role": "assistant", "content": "A", "refusal": 3}], r"messages\[1\].refusal is 3; expected a string"),
        (
            [USER, {"role": "assistant", "content": "A", "phase": "final"}],
            r"phase is 'final'; expected one of commentary, ",
        ),
        ([USER, {"role": "assistant", "content": "A", "phase": [1]}], r"messages\[1\].phase is \[1\]"),
        ([USER, {"role": "tool", "content": "A", "tool_call_id": "1", "tool_calls": [1]}], "has 'tool_calls'"),
        (
            [USER, {"role": "assistant", "content": "A", "reasoning": 3}],
            r"messages\[1\].reasoning is 3; expected a string",
        ),
        ([USER, {"role": "assistant", "function_call": {"name": "f"}}], "function_call is no longer part of the API"),
        ([USER, {"role": "assistant", "tool_calls": {}}], r"messages\[1\].tool_calls is {}; expected a list"),
        ([USER, {"role": "assistant", "tool_calls": ["f"]}], r"messages\[1\].tool_calls\[0\] is 'f'"),
        ([USER, {"role": "assistant", "tool_calls": [call(type="custom")]}], "has the type 'custom'"),
        ([USER, {"role": "assistant", "tool_calls": [call(call_id=None)]}], r"tool_calls\[0\].id is missing"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}], r"tool_calls\[0\].function is missing"),
        ([USER, {"role": "assistant", "tool_calls": [call("a b")]}], r"tool_calls\[0\].function.name is 'a b'"),
        ([USER, {"role": "assistant", "tool_calls": [call("<|end|>")]}], r"tool_calls\[0\].function.name is"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", {"a": 1})]}], r"function.arguments is {'a': 1}"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", "\ud800")]}], "arguments has a lone surrogate"),
        ([USER, {"role": "assistant", "tool_calls": [call(), call("g")]}], r"messages\[1\].tool_calls has an id twice"),
        ([USER, {"role": "tool", "content": "A"}], r"messages\[1\].tool_call_id is missing"),
        (
            [
                USER,
                {"role": "tool", "tool_call_id": "1", "content": "A"},
                {"role": "assistant", "tool_calls": [call()]},
            ],
            r"messages\[1\].tool_call_id is '1', which no earlier tool call has",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "tool_call_id": "1"}],
            r"messages\[2\].content is missing",
        ),
    ],
)
def test_errors_in_messages(messages: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        render(messages, TALES)


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ({}, "tools is {}; expected a list"),
        (["f"], r"tools\[0\] is 'f'"),
        ([{"function": {"name": "f"}}], r"tools\[0\] has the type None; expected one of function, browser, python"),
        ([{"type": ["python"]}], r"tools\[0\] has the type"),
        ([{"type": "function", "name": "f"}], r"tools\[0\].function is missing; expected an object"),
        ([function(None)], r"tools\[0\].function.name is None"),
        ([function("f(x)\n{"), function("a b")], r"tools\[0\].function.name is"),
        ([function("f"), function("f")], r"tools\[1\] is the second function f"),
        ([function("f", description=3)], r"tools\[0\].function.description is 3"),
        ([function("f", description="\ud800")], r"tools\[0\].function.description has a lone surrogate"),
        ([function("f", parameters=[])], r"tools\[0\].function: the parameters of f are list"),
        ([function("f", parameters={"type": 3})], r"tools\[0\].function: the parameters of f.type is 3"),
    ],
)
def test_errors_in_tools(tools: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        render([USER], TALES, tools)


@pytest.mark.parametrize("effort", ["High", "minimal", "", None, 3, ["low"]])
def test_an_unknown_effort(effort: Any) -> None:
    with pytest.raises(RequestError, match=r"reasoning_effort is .* expected one of low, medium, high"):
        render([USER], TALES, reasoning_effort=effort)


@pytest.mark.parametrize("date", ["", "today", "2025-13-01", "2025-02-30", "20250628", "2025-W01-1", "٢٠٢٥-٠٦-٢٨", 3])
def test_a_bad_date(date: Any) -> None:
    with pytest.raises(RequestError, match=r"current_date is .* expected a date like 2025-06-28"):
        render([USER], TALES, current_date=date)


ANYTHING = [
    None, True, False, 0, 1, -1, 10**5000, 1.5, float("nan"), "", "x", "\ud800", "a" * 100_000, [], [1], ["x"], [None],
    [[]], [{}], {}, {"a": 1}, {"type": "text"}, [{"type": "text", "text": 1}], [10**5000], {"id": 10**5000},
    [{"id": "1"}], [{"id": "1", "function": 3}], [{"id": "1", "function": {"name": 10**5000}}], [call()], [call("g")],
    [call(type=10**5000)], [{"type": [1]}], "commentary", ["commentary"], {"name": "f", "arguments": "{}"},
]  # fmt: skip
FIELDS = ["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal", "phase"]
FIELDS += ["function_call", "annotations", "audio", "id", "x"]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
@pytest.mark.parametrize("field", FIELDS)
def test_each_field_of_each_role(role: str, field: str) -> None:
    """Any value is read, refused in a few words, or asks for nothing and changes nothing."""
    whole: dict[str, Any] = {"role": role, "content": "A"} | ({"tool_call_id": "1"} if role == "tool" else {})
    before = [USER, {"role": "assistant", "tool_calls": [call()]}]
    plain = render([*before, whole], TALES)
    for value in ANYTHING:
        try:
            prompt = render([*before, {**whole, field: value}], TALES)
        except RequestError as error:
            assert 0 < len(str(error)) < 400
        else:
            assert field in _KEYS[role] or prompt == plain


def test_numbers_of_any_size_in_tools() -> None:
    for tools in ([{"type": 10**5000}], [10**5000], [function(10**5000)], [function(parameters={"type": 10**5000})]):
        with pytest.raises(RequestError, match=r"of 16610 bits|instance"):
            render([USER], TALES, tools)
    with pytest.raises(RequestError, match="is not JSON"):
        render([USER], TALES, [function(parameters={"default": 10**5000})])


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


def test_an_unknown_policy() -> None:
    with pytest.raises(RequestError, match="earlier_analysis is 'all'; expected one of dropped, openai-harmony, kept"):
        render([USER], TALES, earlier_analysis="all")  # type: ignore[arg-type]


KEYS = """role content name reasoning reasoning_content tool_calls tool_call_id function_call type text function
arguments id parameters description properties oneOf items default enum required""".split()
WORDS = st.sampled_from(
    ["system", "user", "assistant", "tool", "function", "text", "f", "1", "object", "string", "\ud800"]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
LIKELY = st.fixed_dictionaries({"role": WORDS, "content": WORDS | JSON_VALUES, "tool_calls": JSON_VALUES})


@pytest.mark.fuzz
@settings(max_examples=rounds(200), deadline=None, database=None, derandomize=True)
@given(messages=st.lists(LIKELY | JSON_VALUES, max_size=4) | JSON_VALUES, tools=JSON_VALUES, schema=JSON_VALUES)
def test_no_request_is_another_error(messages: Any, tools: Any, schema: Any) -> None:
    calls = [([USER, *messages] if isinstance(messages, list) else messages, tools, "low")]
    calls += [([USER], [function("f", parameters=schema)], "low"), ([USER], [], schema)]
    for arguments in calls:
        try:
            assert render(*arguments[:1], TALES, *arguments[1:])[-1] == ids("assistant")[-1]
        except RequestError as error:
            assert str(error)


@pytest.mark.parametrize("key", ["channel", "recipient", "resoning_content", "x" * 100_000])
def test_unknown_keys_are_refused(key):
    """A key that is silently left out would be a wrong prompt."""
    asked = {"role": "user", "content": "Hi"}
    says = r"^messages\[1\] has .*which has no meaning here; expected role, content"
    with pytest.raises(RequestError, match=says) as caught:
        render([asked, {"role": "assistant", "content": "x", key: "final"}], TALES)
    assert len(str(caught.value)) < 300
    answer = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, key: None}
    assert render([asked, answer], TALES)
