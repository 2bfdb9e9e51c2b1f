"""What OpenAI's chat form may not be: each fault is named, and there is no other error."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import RequestError
from gptjax.text.fields import _KEYS
from gptjax.text.harmony import render
from tests.fuzz import rounds
from tests.text.harmony_material import TALES, USER, call, function, ids, parts


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages has no message: add one"),
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
