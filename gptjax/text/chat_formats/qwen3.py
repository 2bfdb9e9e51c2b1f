"""Qwen3's format: ChatML with Qwen2.5's tools and with reasoning in `<think>`.

As in the published template, the reasoning of turns before the user's last message is dropped. Those after it, between
tool calls, keep theirs. Reasoning can also be in the content, before `</think>`. With `enable_thinking` false, the
prompt ends with an empty thought, so the model answers at once.
"""

from collections.abc import Iterator

from gptjax.text.chat_formats.chatml import END, START, plain, result, system, written
from gptjax.text.chat_formats.conversation import Conversation, Message


def qwen3(talk: Conversation) -> Iterator[str]:
    """A prompt in Qwen3's format."""
    yield from system(talk)
    asked = _last_question(talk)
    for index, message in enumerate(talk.messages):
        if message.role == "assistant":
            yield from _turn(message, index > asked, is_last=index + 1 == len(talk.messages))
        elif message.role == "tool":
            yield from result(talk, index)
        elif index or message.role != "system":
            yield from plain(message)
    yield from (START, "assistant\n")
    if talk.thinking is False:
        yield "<think>\n\n</think>\n\n"


def _last_question(talk: Conversation) -> int:
    """Where the last message of the user is that is not a tool's result."""
    questions = (
        index
        for index, message in reversed(list(enumerate(talk.messages)))
        if message.role == "user"
        and not (message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>"))
    )
    return next(questions, len(talk.messages) - 1)


def _turn(message: Message, keeps_reasoning: bool, *, is_last: bool) -> Iterator[str]:
    content, reasoning = message.content, message.reasoning or ""
    if message.reasoning is None and "</think>" in content:
        reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    yield from (START, "assistant\n")
    if keeps_reasoning and (is_last or reasoning):
        yield from ("<think>\n", reasoning.strip("\n"), "\n</think>\n\n", content.lstrip("\n"))
    else:
        yield content
    for number, call in enumerate(message.calls):
        yield "\n" if number or content else ""
        yield from written(call)
    yield from (END, "\n")
