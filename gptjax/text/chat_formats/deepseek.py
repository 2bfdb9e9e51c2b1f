"""The formats of DeepSeek-R1's distilled models, which are Qwen's and Llama's.

    <｜begin▁of▁sentence｜>SYSTEM<｜User｜>TEXT<｜Assistant｜>TEXT<｜end▁of▁sentence｜>

As in the published templates, earlier turns lose their reasoning, which is whatever precedes `</think>`. Those
templates write tool calls, but never tell the model which tools there are, so these formats have none.
"""

from collections.abc import Iterator
from typing import Final

from gptjax.text.chat_formats.conversation import Conversation
from gptjax.text.chat_formats.text_format import Mark

BOS: Final = Mark("<｜begin▁of▁sentence｜>")
USER: Final = Mark("<｜User｜>")
ASSISTANT: Final = Mark("<｜Assistant｜>")
END: Final = Mark("<｜end▁of▁sentence｜>")


def r1(talk: Conversation, opening: str = "") -> Iterator[str]:
    """A prompt in R1's format of January 2025; `opening` begins the turn. Only the last system message counts."""
    yield from (BOS, *_system(talk)[-1:])
    for message in talk.messages:
        if message.role == "user":
            yield from (USER, message.content)
        elif message.role == "assistant":
            yield from (ASSISTANT, message.answer, END)
    yield from (ASSISTANT, opening)


def r1_0528(talk: Conversation) -> Iterator[str]:
    """A prompt in the format of May 2025: a question opens the answer, and all system messages count."""
    yield from (BOS, "\n\n".join(_system(talk)))
    asked = False
    for message in talk.messages:
        if message.role == "user":
            yield from (USER, message.content, ASSISTANT)
            asked = True
        elif message.role == "assistant":
            yield from (message.answer, END)
            asked = False
    if not asked:
        yield ASSISTANT


def _system(talk: Conversation) -> list[str]:
    return [message.content for message in talk.messages if message.role == "system"]
