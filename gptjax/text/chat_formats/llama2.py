"""The formats of Llama 2 and of Mistral's first two instruct models, which have `[INST]`, and of Zephyr.

    <s>[INST] <<SYS>>
    SYSTEM
    <</SYS>>

    USER [/INST] ASSISTANT </s><s>[INST] USER [/INST]

`[INST]`, `<<SYS>>` and Zephyr's `<|user|>` are text, not special tokens, so users can write them, too.
"""

from collections.abc import Iterator
from typing import Final

from gptjax.errors import RequestError
from gptjax.text.chat_formats.conversation import Conversation, Message
from gptjax.text.chat_formats.text_format import Mark

BOS: Final = Mark("<s>")
EOS: Final = Mark("</s>")


def llama2(talk: Conversation) -> Iterator[str]:
    """A prompt in Llama 2's format. Every exchange has a BOS."""
    messages, system = talk.messages, ""
    if messages[0].role == "system":
        system, messages = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n", messages[1:]
        if not messages:
            raise RequestError("messages has only a system message, which in this format is part of the user's first")
    _check_alternation(messages, "after a system message, the user and the assistant take turns")
    for index, message in enumerate(messages):
        if message.role == "user":
            text = (system if index == 0 else "") + message.content
            yield from (BOS, "[INST] ", text.strip(), " [/INST]")
        else:
            yield from (" ", message.content.strip(), " ", EOS)


def mistral(talk: Conversation, after: str = "") -> Iterator[str]:
    """A prompt in the format of Mistral-7B-Instruct; `after` follows each EOS."""
    _check_alternation(talk.messages, "the user and the assistant take turns, without a system message")
    yield BOS
    for message in talk.messages:
        if message.role == "user":
            yield from ("[INST] ", message.content, " [/INST]")
        else:
            yield from (message.content, EOS, after)


def zephyr(talk: Conversation) -> Iterator[str]:
    """A prompt in the format of Zephyr and TinyLlama."""
    for message in talk.messages:
        yield from (f"<|{message.role}|>\n", message.content, EOS, "\n")
    yield "<|assistant|>\n"


def _check_alternation(messages: tuple[Message, ...], rule: str) -> None:
    for index, message in enumerate(messages):
        if message.role != ("assistant" if index % 2 else "user"):
            raise RequestError(f"{message.where} has the role {message.role}, but in this format {rule}")
    if messages[-1].role != "user":
        raise RequestError(f"{messages[-1].where} is the assistant's, but in this format the user's must be the last")
