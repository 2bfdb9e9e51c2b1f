"""Qwen3's formats: ChatML with Qwen2.5's tools, and with reasoning in `<think>`.

As in the published templates, the reasoning of turns before the user's last message is dropped. Those after it, between
tool calls, keep theirs. Reasoning can also be in the content, before `</think>`. With `enable_thinking` false, the
prompt ends with an empty thought, so the model answers at once. The models of July 2025 either always think (the prompt
begins the thought) or never do (their template drops all reasoning).
"""

from collections.abc import Iterator

from gptjax.text.chat_formats.chatml import END, START, plain, result, system, written
from gptjax.text.chat_formats.conversation import Conversation, Message


def qwen3(talk: Conversation, *, thinks: bool = True, opening: str = "") -> Iterator[str]:
    """A prompt in Qwen3's format; `opening` begins the turn."""
    yield from system(talk)
    asked = _last_question(talk)
    for index, message in enumerate(talk.messages):
        if message.role == "assistant":
            keeps = thinks and index > asked
            thought, content = _parts(message) if thinks else ("", message.content)
            yield from _turn(message, content, thought if keeps else "", always=keeps and message is talk.messages[-1])
        elif message.role == "tool":
            yield from result(talk, index)
        elif index or message.role != "system":
            yield from plain(message.role, message.content)
    yield from (START, "assistant\n", "<think>\n\n</think>\n\n" if talk.thinking is False else opening)


def _last_question(talk: Conversation) -> int:
    """Where the last message of the user is that is not a tool's result."""
    for index in reversed(range(len(talk.messages))):
        message = talk.messages[index]
        is_result = message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")
        if message.role == "user" and not is_result:
            return index
    return len(talk.messages) - 1


def _parts(message: Message) -> tuple[str, str]:
    """The reasoning and the content of a message, which may have both in its content."""
    content = message.content
    if message.reasoning is not None or "</think>" not in content:
        return message.reasoning or "", content
    before = content.split("</think>")[0]
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), message.answer.lstrip("\n")


def _turn(message: Message, content: str, reasoning: str, *, always: bool) -> Iterator[str]:
    """A turn of the assistant's; `always` writes even empty reasoning."""
    yield from (START, "assistant\n")
    if reasoning or always:
        yield from ("<think>\n", reasoning.strip("\n"), "\n</think>\n\n", content.lstrip("\n"))
    else:
        yield content
    for number, call in enumerate(message.calls):
        yield "\n" if number or content else ""
        yield from written(call)
    yield from (END, "\n")
