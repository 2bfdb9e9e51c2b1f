"""The grammar of a whole turn: reasoning stays free, and the answer or a call's arguments are of a given form.

What a chat format's reader reads is written here as a grammar, with the format's special tokens by their numbers.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from gptjax.errors import RequestError
from gptjax.structured.grammar import Grammar
from gptjax.support.quoting import quoted
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import ChatFormat, ChatOptions
from gptjax.text.chat_formats.harmony import offered_names
from gptjax.text.chat_formats.json_calls import read_json_calls
from gptjax.text.chat_formats.tagged import CALL, THINK, read_calls, read_on, read_thoughts_and_calls
from gptjax.text.chat_formats.text_format import TextFormat

_ANYTHING: Final = r"/(.|\n)*/"
_MOST_MESSAGES: Final = 8  # of reasoning, and preambles of calls: a model in a muddle repeats them
_NO_PARAMETERS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a request asks of a turn's form."""

    answer: Grammar | None = None  # None: any text
    choice: str | None = None  # "required", or the name of the function to call; None: as the model likes


def turn_grammar(chat_format: ChatFormat, tokenizer: Tokenizer, options: ChatOptions, wishes: Wishes) -> Grammar | None:
    """The grammar of the turn that follows a prompt; None if it may be anything.

    Raises:
      RequestError: the function is unknown, its parameters do not compile, or the chat format has no tool calls.
    """
    strict = any(_is_strict(tool) for tool in options.tools)
    if wishes.answer is None and wishes.choice is None and not strict:
        return None
    functions = _functions(options.tools, wishes.choice)
    if wishes.choice is not None and not functions:
        raise RequestError(f"tool_choice is {quoted(wishes.choice)}, but no tools are offered")
    if isinstance(chat_format, TextFormat):
        return _Text(chat_format, tokenizer, options, wishes, functions).grammar()
    return _harmony(tokenizer, options, wishes, functions)


def _functions(tools: Sequence[Mapping[str, Any]], choice: str | None) -> dict[str, Grammar]:
    """The functions that may be called, and what their arguments must be."""
    found = {}
    for index, tool in enumerate(tools):
        function = tool["function"] if tool.get("type") == "function" else {"name": None}
        if function["name"] is not None and choice in (None, "required", function["name"]):
            found[function["name"]] = _arguments(function, f"tools[{index}].function", strict=_is_strict(tool))
    if choice not in (None, "required") and not found:
        raise RequestError(f"tool_choice names the function {quoted(choice)}, which is not among the tools")
    return found


def _is_strict(tool: Mapping[str, Any]) -> bool:
    function = tool.get("function")
    return isinstance(function, Mapping) and function.get("strict") is True


def _arguments(function: Mapping[str, Any], where: str, *, strict: bool) -> Grammar:
    """The grammar of a function's arguments: its schema or, if that does not compile and need not, any object."""
    schema = function.get("parameters")
    try:
        if schema is None:
            return Grammar.of_json_schema(_NO_PARAMETERS)
        if isinstance(schema, Mapping) and schema.get("type") not in (None, "object"):
            raise RequestError("the JSON schema has 'type' at #: arguments are an object")
        return Grammar.of_json_schema({**schema, "type": "object"} if isinstance(schema, Mapping) else schema)
    except RequestError as error:
        if strict:
            raise RequestError(f"{where}.parameters: {error}") from None
        return Grammar.of_json_object()


def _harmony(tokenizer: Tokenizer, options: ChatOptions, wishes: Wishes, functions: Mapping[str, Grammar]) -> Grammar:
    mark = {name: _token(tokenizer, f"<|{name}|>") for name in ("channel", "message", "start", "end", "call", "return")}
    json_ = f'(" "? {_token(tokenizer, "<|constrain|>")} "json" | " json")?'
    # A preamble of calls is part of what users see.
    channels = '("analysis" | "commentary")' if wishes.answer is None else '"analysis"'
    rules = {
        "free": f'{mark["channel"]} {channels} {mark["message"]} TEXT {mark["end"]} {mark["start"]} "assistant"',
        "TEXT": _ANYTHING,
    }
    ways = []
    if wishes.choice is None:
        rules["answer"] = "TEXT" if wishes.answer is None else wishes.answer.body
        form = "" if wishes.answer is None else json_
        ways.append(f'{mark["channel"]} "final" {form} {mark["message"]} answer {mark["return"]}')
        built_in = offered_names([tool for tool in options.tools if tool.get("type") != "function"])
        for name in sorted(built_in):
            header = f'("analysis" | "commentary") {json.dumps(f" to={name}")} " code"?'
            ways.append(f"{mark['channel']} {header} {mark['message']} TEXT {mark['call']}")
    for number, (name, arguments) in enumerate(functions.items()):
        rules[f"arguments_{number}"] = arguments.body
        to = json.dumps(f" to=functions.{name}")
        header = f'{mark["channel"]} "commentary" {to} {json_} | {to} {mark["channel"]} "commentary" {json_}'
        ways.append(f"({header}) {mark['message']} arguments_{number} {mark['call']}")
    return _grammar(f"free{{0,{_MOST_MESSAGES}}} ({' | '.join(ways)})", rules)


class _Text:
    """The grammar of a turn that is text between special tokens."""

    def __init__(
        self,
        chat_format: TextFormat,
        tokenizer: Tokenizer,
        options: ChatOptions,
        wishes: Wishes,
        functions: Mapping[str, Grammar],
    ) -> None:
        self._format = chat_format
        self._tokenizer = tokenizer
        self._options = options
        self._wishes = wishes
        self._functions = functions
        self._rules: dict[str, str] = {}
        self._tagged = chat_format.read in (read_calls, read_thoughts_and_calls, read_on)
        if functions and not (self._tagged or chat_format.read is read_json_calls):
            raise RequestError(f"tools have no meaning in the chat format {chat_format.name}: leave them out")

    def grammar(self) -> Grammar:
        """The whole."""
        ways, choice = [], self._wishes.choice
        before = ""
        if choice is None and self._wishes.answer is not None:
            self._rules["answer"] = self._wishes.answer.body
            ways.append("answer")
        elif choice is None:
            ways.append(self._any_text())
            before = self._before_call()
        ways += [f"{before} {self._call(number, name)}" for number, name in enumerate(self._functions)]
        return _grammar(f"{self._thoughts()} ({' | '.join(ways)})", self._rules)

    def _thoughts(self) -> str:
        """Reasoning, which is free, if the format has any."""
        if self._format.read not in (read_thoughts_and_calls, read_on) or self._options.enable_thinking is False:
            return ""
        self._rules["NEWLINES"] = r"/\n{0,2}/"
        reasoning = f"{self._up_to(THINK[1])} NEWLINES"
        return reasoning if self._format.read is read_on else f"({self._tag(THINK[0])} {reasoning})?"

    def _any_text(self) -> str:
        """A text without a call."""
        special = self._tokenizer.special_ids
        if self._tagged and CALL[0] not in special:
            self._rules["TEXT"] = rf"~/(.|\n)*{CALL[0]}(.|\n)*/"
        else:
            # Where a call is the whole turn, a text begins otherwise.
            self._rules["TEXT"] = _ANYTHING if self._tagged else r"/([^{ \n](.|\n)*)?/"
        return "TEXT"

    def _before_call(self) -> str:
        """A text, and the beginning of a call."""
        return self._up_to(CALL[0]) if self._tagged else ""

    def _call(self, number: int, name: str) -> str:
        self._rules[f"arguments_{number}"] = self._functions[name].body
        word = "arguments" if self._tagged else "parameters"
        head = '{"name": ' + json.dumps(name) + f', "{word}": '
        call = f"{json.dumps(head)} arguments_{number}"
        if not self._tagged:
            return f'{call} "}}"'
        opened = "" if self._wishes.choice is None and self._wishes.answer is None else self._tag(CALL[0])
        return rf'{opened} "\n" {call} "}}\n" {self._tag(CALL[1])}'

    def _up_to(self, tag: str) -> str:
        """Any text up to a tag, and this."""
        if tag in self._tokenizer.special_ids:
            self._rules["ANY"] = _ANYTHING
            return f"ANY {self._tag(tag)}"
        rule = "up_to_think" if tag in THINK else "up_to_call"
        self._rules[f'{rule}[suffix="{tag}"]'] = _ANYTHING
        return rule

    def _tag(self, tag: str) -> str:
        return _token(self._tokenizer, tag) if tag in self._tokenizer.special_ids else json.dumps(tag)


def _token(tokenizer: Tokenizer, name: str) -> str:
    return f"<[{tokenizer.special_ids[name]}]>"


def _grammar(body: str, rules: Mapping[str, str]) -> Grammar:
    return Grammar(body, "".join(_lines(rules.items())))


def _lines(rules: Iterable[tuple[str, str]]) -> Iterable[str]:
    return (f"{name}: {text}\n" for name, text in rules)
