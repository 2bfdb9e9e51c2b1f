"""The grammars of whole turns: what they allow is read back by the chat format's own reader."""

import json
import random

import jsonschema
import numpy as np
import pytest

from gptjax.engine.settings import all_allowed
from gptjax.errors import RequestError
from gptjax.structured import Grammar
from gptjax.structured.matching import Compiler
from gptjax.structured.turns import Wishes, turn_grammar
from gptjax.structured.wishes import grammar_of_turn
from gptjax.text.chat_formats import FORMATS, ChatOptions
from gptjax.text.chat_formats.json_calls import read_json_calls
from gptjax.text.chat_formats.tagged import read_on
from tests.structured.walks import CLOSING, tokenizer
from tests.text.chat_material import chat_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
ANSWER = Grammar.of_json_schema(SCHEMA)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}} for name in ("rain", "snow")
]
TEXT_FORMATS = sorted(set(FORMATS) - {"harmony"})
CALLING = [name for name in TEXT_FORMATS if "tools" in FORMATS[name].options]


@pytest.fixture(scope="module", params=[True, False], ids=["tags", "words"])
def vocabulary(request, tmp_path_factory):
    """With tags as tokens, and without."""
    text = chat_tokenizer(tmp_path_factory.mktemp("turns"), tags=request.param)
    return text, Compiler(text, text.vocab_size)


def turns(vocabulary, name: str, options: ChatOptions, wishes: Wishes, count: int):
    """The readers and answers of random turns."""
    text, compiler = vocabulary
    known = FORMATS[name]
    grammar = turn_grammar(known, text, options, wishes)
    ends = known.stop_ids(text)
    marks = frozenset(text.special_ids.values())
    closing = frozenset(
        each for each in range(text.vocab_size) if text.token_bytes(each) in (*CLOSING, b"<", b"</", b"</think>", b"\n")
    )
    found = 0
    for seed in range(count):
        chance, matcher, reader = random.Random(seed), compiler.matcher(grammar, ends), known.reader(text, options)
        said, last = [], None
        if known.read is read_on:  # chance alone would not spell the tag
            for token_id in text.encode("Hm {.\n</think>"):
                matcher.take(token_id)
                said.append(reader.push(token_id))
        for _ in range(250):
            words_1W = all_allowed(1, text.vocab_size)
            matcher.fill(words_1W[0])
            ids = np.flatnonzero(np.unpackbits(words_1W.view(np.uint8), bitorder="little")).tolist()
            assert matcher.failure is None
            short = [each for each in ids if each in marks] or [each for each in ids if each in closing]
            last = chance.choice(short if short and chance.random() < 0.6 else ids)
            if last in ends:
                break
            matcher.take(last)
            said.append(reader.push(last))
        if last in ends:
            found += 1
            said.append(reader.finish())
            reader.ended_by(last)
            yield reader, "".join(said)
    assert found


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_answers(vocabulary, name):
    for _, answer in turns(vocabulary, name, ChatOptions(), Wishes(ANSWER), 3):
        jsonschema.validate(json.loads(answer), SCHEMA)


@pytest.mark.parametrize("choice", ["required", "snow"])
@pytest.mark.parametrize("name", CALLING)
def test_forced_calls(vocabulary, name, choice):
    for reader, answer in turns(vocabulary, name, ChatOptions(TOOLS), Wishes(choice=choice), 3):
        (call,) = reader.tool_calls
        assert call.name in ({"rain", "snow"} if choice == "required" else {"snow"})
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
        assert answer.strip() == ""


@pytest.mark.parametrize("name", CALLING)
def test_an_answer_or_a_call(vocabulary, name):
    kinds = set()
    for reader, answer in turns(vocabulary, name, ChatOptions(TOOLS), Wishes(ANSWER), 4):
        kinds.add(bool(reader.tool_calls))
        for call in reader.tool_calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMA)
        if not reader.tool_calls:
            jsonschema.validate(json.loads(answer), SCHEMA)
    assert kinds


@pytest.mark.parametrize("name", CALLING)
def test_strict_tools_leave_the_answer_free(vocabulary, name):
    text, compiler = vocabulary
    grammar = turn_grammar(FORMATS[name], text, ChatOptions(TOOLS, enable_thinking=_no_thoughts(name)), Wishes())
    start = "Hm.\n</think>\n\n" if FORMATS[name].read is read_on else ""
    good = '{"name": "rain", "arguments": {"city": "Oslo"}}'
    calls = [f"Well, <tool_call>\n{good}\n</tool_call>", f"<tool_call>\n{good}\n</tool_call>"]
    if FORMATS[name].read is read_json_calls:
        calls = [good.replace("arguments", "parameters")]
    for said, fits in [
        ("It is late <b>.", True),
        ("", True),
        *((call, True) for call in calls),
        *((call.replace("rain", "fog"), False) for call in calls),
        *((call.replace("Oslo", "Bonn"), False) for call in calls),
        *((call.replace('"city"', '"town"'), False) for call in calls),
    ]:
        matcher = compiler.matcher(grammar, (), text.encode(start + said, special=True))
        assert (matcher.failure is None and matcher.inner.is_accepting()) == fits, said


def _no_thoughts(name: str) -> bool | None:
    return False if "enable_thinking" in FORMATS[name].options else None


def test_harmony_forces_a_tool_by_its_header():
    text = tokenizer("gpt-oss-tales")
    compiler = Compiler(text, text.vocab_size)
    grammar = turn_grammar(FORMATS["harmony"], text, ChatOptions(TOOLS), Wishes(choice="snow"))
    thought = "<|channel|>analysis<|message|>So {.<|end|><|start|>assistant"
    arguments = '<|message|>{"city": "Oslo"}<|call|>'
    for turn, fits in [
        (f"{thought}<|channel|>commentary to=functions.snow <|constrain|>json{arguments}", True),
        (f"<|channel|>commentary to=functions.snow json{arguments}", True),
        (f" to=functions.snow<|channel|>commentary{arguments}", True),
        (f"<|channel|>commentary to=functions.rain <|constrain|>json{arguments}", False),
        (f"<|channel|>final{arguments}", False),
        (f"{thought}<|channel|>commentary to=functions.snow{arguments.replace('Oslo', 'Bonn')}", False),
    ]:
        matcher = compiler.matcher(grammar, (), text.encode(turn, special=True))
        assert (matcher.failure is None) == fits, turn


def test_harmonys_own_tools_may_be_called_as_well():
    text = tokenizer("gpt-oss-tales")
    grammar = turn_grammar(FORMATS["harmony"], text, ChatOptions([*TOOLS, {"type": "python"}]), Wishes())
    turn = "<|channel|>analysis to=python code<|message|>print(1)<|call|>"
    matcher = Compiler(text, text.vocab_size).matcher(grammar, (), text.encode(turn, special=True))
    assert matcher.failure is None


def test_nothing_is_constrained_that_was_not_asked_for():
    text = tokenizer("gpt-oss-tales")
    loose = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    for form, choice in ((None, None), ({"type": "text"}, "auto"), ("text", "none")):
        assert grammar_of_turn(FORMATS["harmony"], text, ChatOptions(loose), form, choice) is None


@pytest.mark.parametrize("name", ["chatml", "llama-2"])
def test_a_format_without_calls_refuses_tools(vocabulary, name):
    with pytest.raises(RequestError, match="tools"):
        turn_grammar(FORMATS[name], vocabulary[0], ChatOptions(TOOLS), Wishes())
