"""Harmony against openai-harmony 0.0.8, live, on GPT-OSS's own vocabulary."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gptjax.errors import RequestError
from gptjax.text import Tokenizer, harmony, load_tokenizer
from gptjax.text.harmony import DeveloperContent, Function, Message, Namespace, SystemContent
from tests.oracles import harmony_cases as cases
from tests.oracles import o200k

theirs = pytest.importorskip("openai_harmony")

pytestmark = pytest.mark.oracle

HELD_OUT = Path(__file__).resolve().parents[1] / "data" / "held-out.txt"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return o200k.write(tmp_path_factory.mktemp("o200k"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def encoding(directory: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(directory))
        return theirs.load_harmony_encoding(theirs.HarmonyEncodingName.HARMONY_GPT_OSS)


def _namespace(tool: Namespace) -> Any:
    members = [_function(function) for function in tool.functions]
    return theirs.ToolNamespaceConfig(name=tool.name, description=tool.description, tools=members)


def _function(function: Function) -> Any:
    return theirs.ToolDescription.new(function.name, function.description, function.parameters)


def _content(content: str | SystemContent | DeveloperContent) -> Any:
    if isinstance(content, str):
        return theirs.TextContent(text=content)
    tools = {tool.name: _namespace(tool) for tool in content.tools} or None
    if isinstance(content, DeveloperContent):
        return theirs.DeveloperContent(instructions=content.instructions, tools=tools)
    return theirs.SystemContent(
        model_identity=content.model_identity,
        knowledge_cutoff=content.knowledge_cutoff,
        conversation_start_date=content.current_date,
        reasoning_effort=content.reasoning_effort and theirs.ReasoningEffort(content.reasoning_effort.title()),
        channel_config=theirs.ChannelConfig.require_channels(list(content.channels)),
        tools=tools,
    )


def _message(message: Message) -> Any:
    return theirs.Message(
        author=theirs.Author(role=theirs.Role(message.role), name=message.name),
        content=[_content(message.content)],
        channel=message.channel,
        recipient=message.recipient,
        content_type=message.content_type,
    )


def _render(
    encoding: Any, messages: Sequence[Message], drop_analysis: bool = True, completion: bool = True
) -> list[int]:
    talk = theirs.Conversation.from_messages([_message(message) for message in messages])
    config = theirs.RenderConversationConfig(auto_drop_analysis=drop_analysis)
    if completion:
        return encoding.render_conversation_for_completion(talk, theirs.Role.ASSISTANT, config)
    return encoding.render_conversation(talk, config)


def _ours(message: Any) -> Message:
    """Their message, its text in one."""
    text = "".join(part.text for part in message.content)
    role, name = message.author.role.value, message.author.name
    return Message(role, text, name, message.channel, message.recipient, message.content_type)


# The vocabulary


def test_the_vocabulary_gives_the_same_ids(encoding: Any, tokenizer: Tokenizer) -> None:
    pick = random.Random(1)
    text = HELD_OUT.read_text(encoding="utf-8")
    passages = [text[start : start + 1000] for start in range(0, len(text), 2000)]
    letters = [chr(point) for point in range(0x3000) if chr(point).isprintable()] + list(
        " \n\t\r'東京語한국👍🏽\u200d☃"
    )
    passages += ["".join(pick.choices(letters, k=pick.randint(1, 40))) for _ in range(3000)]
    passages += ["I'LL they're 12345 x\r\n\r\n  y\n", "   \n a", "<|start|>", "a" * 300, " " * 300, "ab" * 100]
    for passage in passages:
        assert tokenizer.encode(passage) == encoding.encode(passage, disallowed_special=())
    for token_id in range(0, 199998, 17):
        assert tokenizer.token_bytes(token_id).decode(errors="replace") == encoding.decode([token_id])
    for token in set(o200k.SPECIAL.values()) - {"<|endofprompt|>"}:  # which openai-harmony calls reserved
        assert encoding.encode(token, allowed_special="all") == [tokenizer.special_ids[token]]


# Rendering


@pytest.mark.parametrize("name", cases.RENDERING)
def test_fixtures(name: str, encoding: Any, tokenizer: Tokenizer) -> None:
    case = cases.RENDERING[name]
    ids = harmony.render_messages(
        case.messages, tokenizer, drop_analysis=case.drop_analysis, completion=case.completion
    )
    assert ids == encoding.encode(cases.read(name), allowed_special="all")
    assert ids == _render(encoding, *case)


def test_random_conversations(encoding: Any, tokenizer: Tokenizer) -> None:
    pick = random.Random(2)
    for _ in range(1500):
        messages = [cases.random_message(pick) for _ in range(pick.randint(0, 8))]
        drop, completion = pick.random() < 0.8, pick.random() < 0.5
        ids = harmony.render_messages(messages, tokenizer, drop_analysis=drop, completion=completion)
        assert ids == _render(encoding, messages, drop, completion), messages


def test_random_system_and_developer_messages(encoding: Any, tokenizer: Tokenizer) -> None:
    pick = random.Random(3)
    tools = (harmony.BROWSER, harmony.PYTHON, cases.functions(), cases.functions(Function("f", "a\r\nb\n\nc\r")))
    for _ in range(300):
        system = SystemContent(
            model_identity=pick.choice((None, "I am.")),
            knowledge_cutoff=pick.choice((None, "2024-06")),
            current_date=pick.choice((None, "2025-06-28")),
            reasoning_effort=pick.choice((None, "low", "high")),
            tools=tuple(pick.sample(tools[:2], pick.randint(0, 2))),
            channels=pick.choice(((), ("final",), ("analysis", "commentary", "final"))),
        )
        instructions = pick.choice((None, "", "Be\n\nbrief.", "<|end|>"))
        developer = DeveloperContent(instructions, tuple(pick.sample(tools, pick.randint(0, 3))[:1]))
        messages = [Message("system", system), Message("developer", developer), Message("user", "Hi.")]
        assert harmony.render_messages(messages, tokenizer) == _render(encoding, messages)


def test_random_schemas(encoding: Any, tokenizer: Tokenizer) -> None:
    pick = random.Random(4)
    for _ in range(4000):
        schema = cases.random_schema(pick)
        function = Function("f", "does", schema if isinstance(schema, dict) else None)
        messages = [Message("developer", DeveloperContent(tools=(cases.functions(function),)))]
        ids = harmony.render_messages(messages, tokenizer)
        assert tokenizer.decode(ids, special=True) == encoding.decode(_render(encoding, messages)), schema
        assert ids == _render(encoding, messages)


def test_a_schema_too_deep_for_them_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nest deeper"):
        Function("f", "", schema)


def test_openais_form(encoding: Any, tokenizer: Tokenizer) -> None:
    """The mapping that `chat.py` documents, written with their classes."""
    Role, new = theirs.Role, theirs.Message.from_role_and_content
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    system = theirs.SystemContent.new().with_reasoning_effort(theirs.ReasoningEffort.HIGH)
    system = system.with_conversation_start_date("2025-06-28").with_browser_tool().with_python_tool()
    developer = theirs.DeveloperContent.new().with_instructions("Be brief.\n\nBe kind.")
    weather = theirs.ToolDescription.new("weather", "Tells it.", parameters)
    developer = developer.with_function_tools([weather, theirs.ToolDescription.new("time", "")])

    def call(text: str, channel: str, recipient: str, content_type: str) -> Any:
        message = new(Role.ASSISTANT, text).with_channel(channel).with_recipient(recipient)
        return message.with_content_type(content_type)

    def result(name: str, text: str, channel: str) -> Any:
        message = theirs.Message.from_author_and_content(theirs.Author.new(Role.TOOL, name), text)
        return message.with_channel(channel).with_recipient("assistant")

    talk = [
        new(Role.SYSTEM, system),
        new(Role.DEVELOPER, developer),
        theirs.Message.from_author_and_content(theirs.Author.new(Role.USER, "ann"), "Weather in <|end|>Bonn and Kiel?"),
        new(Role.ASSISTANT, "Two calls.").with_channel("analysis"),
        new(Role.ASSISTANT, "I look.").with_channel("commentary"),
        call('{"city": "Bonn"}', "commentary", "functions.weather", "<|constrain|>json"),
        call("print(1)", "analysis", "python", "code"),
        result("python", "1", "analysis"),
        result("functions.weather", "rain", "commentary"),
        new(Role.DEVELOPER, theirs.DeveloperContent.new().with_instructions("Hurry.")),
        new(Role.USER, "And?"),
    ]
    calls = [
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
        {"id": "b", "type": "function", "function": {"name": "python", "arguments": "print(1)"}},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "Weather in <|end|>Bonn and Kiel?", "name": "ann"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Two calls.", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "b"},
        {"role": "tool", "content": "rain", "tool_call_id": "a"},
        {"role": "system", "content": "Hurry."},
        {"role": "user", "content": "And?"},
    ]
    tools = [
        {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": parameters}},
        {"type": "browser"},
        {"type": "function", "function": {"name": "time"}},
        {"type": "python"},
    ]
    for more in (
        [],
        [{"role": "assistant", "content": "Rain.", "reasoning": "Done."}, {"role": "user", "content": "!"}],
    ):
        if more:
            talk.append(new(Role.ASSISTANT, "Done.").with_channel("analysis"))
            talk.append(new(Role.ASSISTANT, "Rain.").with_channel("final"))
            talk.append(new(Role.USER, "!"))
        expected = encoding.render_conversation_for_completion(theirs.Conversation.from_messages(talk), Role.ASSISTANT)
        assert harmony.render(messages + more, tokenizer, tools, "high", "2025-06-28") == expected


def _turn(question: str, *, calls: bool) -> list[dict[str, Any]]:
    """A question, and what the assistant did with it."""
    call = {"id": question, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [
        {"role": "assistant", "reasoning_content": f"To {question}, f.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": question, "content": "1"},
    ]
    answer = {"role": "assistant", "reasoning_content": f"So {question}.", "content": "Done."}
    return [{"role": "user", "content": question}, *(asked if calls else []), answer]


def test_earlier_analysis(encoding: Any, tokenizer: Tokenizer) -> None:
    """As openai-harmony, as nobody, and as vLLM, which drops the analysis before the last final message itself."""
    talk = [*_turn("A", calls=False), *_turn("B", calls=True), *_turn("C", calls=True)]
    for end in range(1, len(talk) + 1):
        messages = harmony.conversation(talk[:end])
        last = max((at for at, message in enumerate(messages) if message.channel == "final"), default=0)
        current = [message for at, message in enumerate(messages) if at >= last or message.channel != "analysis"]
        expected = {
            "openai-harmony": _render(encoding, messages),
            "kept": _render(encoding, messages, drop_analysis=False),
            "dropped": _render(encoding, current, drop_analysis=False),
        }
        for policy, ids in expected.items():
            assert harmony.render(talk[:end], tokenizer, earlier_analysis=policy) == ids  # type: ignore[arg-type]


# Parsing


@pytest.mark.parametrize("name", ["test_simple_reasoning_response", "test_simple_tool_call"])
def test_parsing_fixtures_of_ids(name: str, encoding: Any, tokenizer: Tokenizer) -> None:
    ids = [int(number) for number in cases.read(name).split()]
    expected = encoding.parse_messages_from_completion_tokens(ids, theirs.Role.ASSISTANT)
    assert harmony.parse(ids, tokenizer) == [_ours(message) for message in expected]


@pytest.mark.parametrize("name", ["test_streamable_parser", "test_tool_response_parsing"])
def test_parsing_fixtures_of_text(name: str, encoding: Any, tokenizer: Tokenizer) -> None:
    ids = encoding.encode(cases.read(name), allowed_special="all")
    role = theirs.Role.ASSISTANT if name == "test_streamable_parser" else None
    expected = encoding.parse_messages_from_completion_tokens(ids, role)
    assert harmony.parse(ids, tokenizer) == [_ours(message) for message in expected]


def _compare_streams(ids: list[int], role: Any, encoding: Any, tokenizer: Tokenizer) -> None:
    """The same text with the same tokens, beneath the same header, and the same messages."""
    ours, other = harmony.StreamParser(tokenizer), theirs.StreamableParser(encoding, role)
    for token_id in ids:
        events = ours.push(token_id)
        other.process(token_id)
        said = "".join(event.text for event in events if not event.ended)
        assert said == (other.last_content_delta or "")
        for event in events:
            # The first event of a call waits for its text; what it says is compared with the messages below.
            if not event.ended and (event.text or event.recipient is None):
                header = (other.current_channel, other.current_recipient, other.current_content_type)
                assert (event.channel, event.recipient, event.content_type) == header
                assert event.role == other.current_role.value
    ours.finish()
    other.process_eos()
    assert ours.messages == [_ours(message) for message in other.messages]


def _well_formed(message: Message) -> bool:
    """What their parser reads as it was written: no name, no content type without a recipient, a tool's recipient."""
    if message.role == "tool":
        return message.recipient is not None
    return message.name is None and (message.content_type is None or message.recipient is not None)


def test_random_streams(encoding: Any, tokenizer: Tokenizer) -> None:
    pick = random.Random(5)
    for _ in range(1500):
        messages = [cases.random_message(pick) for _ in range(pick.randint(1, 6))]
        ids = harmony.render_messages(list(filter(_well_formed, messages)), tokenizer, completion=False)
        _compare_streams(ids, None, encoding, tokenizer)


CALLS = [
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>",
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
    "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>",
    " to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
    " to=functions.f<|channel|>commentary<|constrain|>json<|message|>{}<|call|>",
    "assistant<|channel|>final<|message|>Hi.<|return|>",
    "<|message|>Hi.<|return|>",
    "<|channel|>analysis to=browser.search code<|message|>{}<|call|>",
    "<|channel|>final<|message|>cut sho",
]


@pytest.mark.parametrize("text", CALLS)
def test_after_the_prompt(text: str, encoding: Any, tokenizer: Tokenizer) -> None:
    ids = encoding.encode(text, allowed_special="all")
    _compare_streams(ids, theirs.Role.ASSISTANT, encoding, tokenizer)


def test_bytes_that_are_no_text(encoding: Any, tokenizer: Tokenizer) -> None:
    pick = random.Random(6)
    begin = encoding.encode("<|channel|>final<|message|>", allowed_special="all")
    odd = [token_id for token_id in range(0, 199998, 7) if "\ufffd" in encoding.decode([token_id])]
    for _ in range(500):
        ids = begin + pick.choices([*odd, 0, 220], k=pick.randint(1, 8)) + [200002]
        expected = encoding.parse_messages_from_completion_tokens(ids, theirs.Role.ASSISTANT)
        assert harmony.parse(ids, tokenizer) == [_ours(message) for message in expected]


@pytest.mark.parametrize(
    ("text", "channel", "content"),
    [
        ("I must refuse<|end|>", None, "I must refuse"),
        ("<|channel|>analysis I must refuse<|end|>", "analysis", "I must refuse"),
        ("... Let's use the tool.<|end|>", None, "... Let's use the tool."),
    ],
)
def test_malformed_as_their_lenient_parser(
    text: str, channel: str | None, content: str, encoding: Any, tokenizer: Tokenizer
) -> None:
    ids = encoding.encode(text + "<|start|>assistant<|channel|>final<|message|>No.<|return|>", allowed_special="all")
    expected = encoding.parse_messages_from_completion_tokens(ids, theirs.Role.ASSISTANT, strict=False)
    assert harmony.parse(ids, tokenizer) == [_ours(message) for message in expected]
    assert harmony.parse(ids, tokenizer)[0] == Message("assistant", content, channel=channel)
