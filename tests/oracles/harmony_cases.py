"""The conversations behind openai/harmony's rendering fixtures (`tests/test_harmony.py` there), and random ones."""

import random
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.text.harmony import BROWSER, PYTHON, DeveloperContent, Function, Message, Namespace, SystemContent

DATA = Path(__file__).resolve().parents[1] / "data" / "harmony"
PARSING = (
    "test_simple_reasoning_response",
    "test_simple_tool_call",
    "test_streamable_parser",
    "test_tool_response_parsing",
)


class Case(NamedTuple):
    messages: list[Message]
    drop_analysis: bool = True
    completion: bool = True


def read(name: str) -> str:
    """A fixture's text; openai/harmony's tests strip its end, too."""
    return (DATA / f"{name}.txt").read_text(encoding="utf-8").rstrip()


def functions(*members: Function) -> Namespace:
    return Namespace("functions", functions=members)


def _system(**fields: Any) -> Message:
    return Message("system", SystemContent(**fields))


def _user(text: str) -> Message:
    return Message("user", text)


def _says(channel: str, text: str) -> Message:
    return Message("assistant", text, channel=channel)


TWO = _user("What is 2 + 2?")
CAPITAL = _user("What is the capital of the largest country in the world?")
ROBOT = Message("developer", DeveloperContent("Answer the user's questions like a robot."))
DATE = {"current_date": "2025-06-28"}
REASONING = {"channels": ("analysis", "final")}

FORMAT = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
LOOKUP = Function(
    "lookup_weather",
    "Use this tool to lookup the weather in a given location. Call it with the parameter 'location', can be any "
    "textual description of a location.",
    {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
)
CURRENT = Function(
    "get_current_weather",
    "Gets the current weather in the provided location.",
    {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "format": FORMAT,
        },
        "required": ["location"],
    },
)
MULTIPLE = Function(
    "get_multiple_weathers",
    "Gets the current weather in the provided list of locations.",
    {
        "type": "object",
        "properties": {
            "locations": {
                "type": "array",
                "items": {"type": "string"},
                "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]',
            },
            "format": FORMAT,
        },
        "required": ["locations"],
    },
)
KITCHENSINK = Function(
    "kitchensink",
    "A function with various complex schemas.",
    {
        "description": "params object",
        "type": "object",
        "properties": {
            "string": {
                "type": "string",
                "title": "STRING",
                "description": "A string",
                "examples": ["hello", "world"],
            },
            "string_nullable": {
                "type": "string",
                "nullable": True,
                "description": "A nullable string",
                "default": "the default",
            },
            "string_enum": {"type": "string", "enum": ["a", "b", "c"]},
            "oneof_string_or_number": {
                "oneOf": [
                    {"type": "string", "default": "default_string_in_oneof"},
                    {"type": "number", "description": "numbers can happen too"},
                ],
                "description": "a oneof",
                "default": 20,
            },
        },
    },
)
WEATHER = (Function("get_location", "Gets the location of the user."), CURRENT, MULTIPLE, KITCHENSINK)

RENDERING = {
    "test_simple_convo": Case([_system(), TWO]),
    **{
        f"test_simple_convo_{effort}_effort": Case([_system(reasoning_effort=effort), ROBOT, CAPITAL])
        for effort in ("low", "medium", "high")
    },
    **{
        f"test_simple_convo_{effort}_effort_no_instruction": Case([_system(reasoning_effort=effort), CAPITAL])
        for effort in ("low", "medium", "high")
    },
    "test_reasoning_system_message": Case([_system(**REASONING), TWO]),
    "test_reasoning_system_message_no_instruction": Case(
        [
            _system(reasoning_effort="high", **REASONING),
            _user("What is the best place to eat candy in the world?"),
        ]
    ),
    "test_reasoning_system_message_with_dates": Case(
        [
            _system(current_date="2021-01-01", knowledge_cutoff="2021-01", **REASONING),
            _user("What is 42 * pi?"),
        ]
    ),
    "test_render_functions_with_parameters": Case(
        [
            _system(reasoning_effort="high", **DATE),
            Message("developer", DeveloperContent("Always respond in riddles", (functions(*WEATHER),))),
            _user("What is the weather like in SF?"),
        ]
    ),
    "test_no_tools": Case([_system(**DATE)]),
    "test_browser_tool_only": Case([_system(tools=(BROWSER,), **DATE)]),
    "test_browser_and_function_tool": Case(
        [
            _system(tools=(BROWSER,), **DATE),
            Message("developer", DeveloperContent(tools=(functions(LOOKUP),))),
        ]
    ),
    "test_browser_and_python_tool": Case([_system(tools=(PYTHON, BROWSER), **DATE)]),
    "test_dropping_cot_by_default": Case(
        [
            TWO,
            _says("analysis", "User asks: “What is 2 + 2?” Simple arithmetic. Provide answer."),
            _says("final", "2 + 2 equals 4."),
            _user("What about 9 / 2?"),
        ]
    ),
    "test_does_not_drop_if_ongoing_analysis": Case(
        [
            _user("What is the weather in SF?"),
            _says("analysis", "User asks: “What is the weather in SF?” We need to use lookup_weather tool."),
            Message(
                "assistant",
                '{"location": "San Francisco"}',
                None,
                "commentary",
                "functions.lookup_weather",
                "<|constrain|>json",
            ),
            Message("tool", '{"temperature": 20, "description": "sunny"}', "functions.lookup_weather"),
        ]
    ),
    "test_preserve_cot": Case(
        [
            TWO,
            _says("analysis", 'User asks a simple question: "What is 2 + 2?" The answer: 4.'),
            _says("final", "2 + 2 equals 4."),
            _user("What about 9 / 2?"),
        ],
        drop_analysis=False,
    ),
    "test_keep_analysis_between_finals": Case(
        [
            TWO,
            _says("analysis", "thinking 2+2"),
            _says("final", "4"),
            _user("What is 3 + 5?"),
            _says("analysis", "thinking 3+5"),
            _says("final", "8"),
        ],
        completion=False,
    ),
}

# Split characters, blanks at the ends, and what looks like the format.
_TEXTS = (
    "",
    " ",
    "\n",
    "Hi.",
    " two words ",
    "naïve 東京 👩‍👩‍👧",
    "<|start|>assistant",
    "<|end|>",
    "to=x",
    "a\r\nb\n",
    '{"a": 1}',
)


def random_text(pick: random.Random) -> str:
    return "".join(pick.choices(_TEXTS, k=pick.randint(0, 4)))


def random_message(pick: random.Random) -> Message:
    """A message whose content is text, with any header that the format allows."""
    role = pick.choice(("user", "assistant", "assistant", "assistant", "tool", "developer", "system"))
    text = random_text(pick)
    channel = pick.choice((None, "analysis", "commentary", "final"))
    if role == "tool":
        return Message("tool", text, pick.choice(("functions.f", "python")), channel, pick.choice((None, "assistant")))
    if role != "assistant":
        return Message(role, text, pick.choice((None, "alice", "bob:2")) if role == "user" else None)
    recipient = pick.choice((None, None, "functions.get_weather", "python"))
    content_type = pick.choice((None, "code", "<|constrain|>json"))
    return Message("assistant", text, None, channel, recipient, content_type)


def random_schema(pick: random.Random, depth: int = 3) -> Any:
    """A JSON schema, often an odd one: any keyword beside any type."""
    kinds = ["string", "number", "integer", "boolean", "null", "array", "object", "object", "strange"]
    schema: dict[str, Any] = {"type": pick.choice(kinds)} if pick.random() < 0.9 else {}
    if pick.random() < 0.1:
        schema["type"] = pick.sample(kinds, pick.randint(0, 3))
    extras = {
        "description": pick.choice(("says", "null and\nvoid", "", "says")),
        "title": "A title",
        "default": pick.choice(("a", 'q"\n', 1, -2.5, 1e-05, 1e16, 2**64, True, None, ["a", {"b": 1e-7}])),
        "nullable": pick.random() < 0.7,
        "enum": pick.choice((["a", "b"], ["a", 1], [1, 2], [])),
        "examples": pick.choice((["e", 'f"'], [1], [])),
        "anyOf": [{"type": "string"}],
    }
    schema |= {key: value for key, value in extras.items() if pick.random() < 0.25}
    if depth == 0:
        return schema
    if pick.random() < 0.2:
        schema["oneOf"] = [random_schema(pick, depth - 1) for _ in range(pick.randint(0, 3))]
    if schema.get("type") == "array" and pick.random() < 0.8:
        schema["items"] = pick.choice((random_schema(pick, depth - 1), True, [{"type": "string"}]))
    if schema.get("type") == "object" and pick.random() < 0.9:
        names = pick.sample(("a", "b c", "ç", "d"), pick.randint(0, 4))
        schema["properties"] = {name: random_schema(pick, depth - 1) for name in names}
        schema["required"] = pick.sample(("a", "b c", "z"), pick.randint(0, 2))
    return schema if pick.random() < 0.95 else True
