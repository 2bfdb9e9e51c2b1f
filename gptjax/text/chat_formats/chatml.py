"""ChatML and Qwen's variants of it.

    <|im_start|>ROLE
    TEXT<|im_end|>

A default system message, if the format has one, is added unless the conversation begins with one. Tools are described
in the system message, and called as Hermes models do: JSON in `<tool_call>`, results in the user's message in
`<tool_response>`. The texts are those of the published templates of Qwen2.5 and Qwen3, which write tools alike.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Final

from gptjax.text.chat_formats.conversation import Call, Conversation, Message, as_json
from gptjax.text.chat_formats.text_format import Mark

START: Final = Mark("<|im_start|>")
END: Final = Mark("<|im_end|>")
_TOOLS: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>"
)
_CALLING: Final = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def chatml(
    talk: Conversation,
    default: str | None = None,
    *,
    content: Callable[[Message], str] = operator.attrgetter("content"),
) -> Iterator[str]:
    """A prompt in ChatML.

    Args:
      default: the default system message.
      content: what is written of a message's content.
    """
    yield from system(talk, default)
    for index, message in enumerate(talk.messages):
        if message.role == "tool":
            yield from result(talk, index)
        elif message.calls:
            yield from (START, message.role)
            yield f"\n{content(message)}" if message.content else ""
            for call in message.calls:
                yield from ("\n", *written(call))
            yield from (END, "\n")
        elif index or message.role != "system":
            yield from plain(message.role, content(message))
    yield from (START, "assistant\n")


def system(talk: Conversation, default: str | None = None) -> Iterator[str]:
    """The first system message, which also describes the tools."""
    first = talk.messages[0]
    text = first.content if first.role == "system" else default
    if text is None and not talk.tools:
        return
    yield from (START, "system\n", text or "")
    if talk.tools:
        yield ("" if text is None else "\n\n") + _TOOLS
        for tool in talk.tools:
            yield "\n"
            yield from as_json(tool)
        yield _CALLING
    yield from (END, "\n")


def plain(role: str, content: str) -> Iterator[str]:
    """A message that is only text."""
    yield from (START, role, "\n", content, END, "\n")


def written(call: Call) -> Iterator[str]:
    """A tool call."""
    yield from ('<tool_call>\n{"name": "', call.name, '", "arguments": ', call.arguments, "}\n</tool_call>")


def result(talk: Conversation, index: int) -> Iterator[str]:
    """A tool's result: results in a row are one message of the user's."""
    messages = talk.messages
    if index == 0 or messages[index - 1].role != "tool":
        yield from (START, "user")
    yield from ("\n<tool_response>\n", messages[index].content, "\n</tool_response>")
    if index + 1 == len(messages) or messages[index + 1].role != "tool":
        yield from (END, "\n")
