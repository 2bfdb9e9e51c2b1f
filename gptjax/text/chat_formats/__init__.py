"""Chat formats: conversations to token ids, and a turn's token ids back to reasoning, answer and tool calls.

    interface.py     what every format offers: `ChatFormat`, `TurnReader`
    known.py         the formats by name, and how a checkpoint's template chooses one
    harmony.py       GPT-OSS's, on top of `gptjax.text.harmony`
    text_format.py   the others, whose messages are texts between special tokens: `TextFormat`
    conversation.py  OpenAI's chat API to the messages that they write
    readers.py       their turns, as they stream (tagged.py, json_calls.py)
    calls.py         a turn's calls, as they stream
    chatml.py, qwen3.py, qwq.py, deepseek.py, llama3.py, llama2.py: what they write, as the published templates do

Nothing here executes a template from a file.
"""

from gptjax.text.chat_formats.interface import (
    DEFAULT,
    CallPart,
    ChatFormat,
    ChatOptions,
    ToolCall,
    TurnReader,
    check_options,
)
from gptjax.text.chat_formats.known import FORMATS, choose_format

__all__ = [
    "DEFAULT",
    "FORMATS",
    "CallPart",
    "ChatFormat",
    "ChatOptions",
    "ToolCall",
    "TurnReader",
    "check_options",
    "choose_format",
]
