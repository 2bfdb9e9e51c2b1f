"""QwQ-32B's format: Qwen2.5's, without its default system message, and with a prompt that begins the reasoning.

Earlier turns lose whatever precedes `</think>`. The template as first published takes it from an assistant's message at
the end of the conversation, too; the later one does not.
"""

from collections.abc import Iterator

from gptjax.text.chat_formats.chatml import chatml
from gptjax.text.chat_formats.conversation import Conversation, Message


def qwq(talk: Conversation, *, keeps_last: bool = True) -> Iterator[str]:
    """A prompt in QwQ's format; `keeps_last` is whether the last message keeps its reasoning."""

    def content(message: Message) -> str:
        if message.role != "assistant" or (keeps_last and message is talk.messages[-1]):
            return message.content
        return message.answer.lstrip("\n")

    yield from chatml(talk, "" if talk.tools else None, content=content)
    yield "<think>\n"
