"""Harmony, the format that GPT-OSS reads and writes: conversations to token ids, and token ids back to messages.

The format is openai/harmony's `docs/format.md`, the exact text and tokens those of openai-harmony 0.0.8.

    chat.py       conversations in the form of OpenAI's chat API, as harmony messages (tools.py, fields.py); `render`
    rendering.py  harmony messages as token ids, in bounded time and memory (writer.py)
    schema.py     JSON schemas in the TypeScript-like form that tools are described in
    parsing.py    token ids, one by one, as events and messages; header.py reads the headers, also malformed ones
    messages.py   the messages that all of them use; special.py, the special tokens; builtin.py, the built-in tools
"""

from gptjax.text.harmony.builtin import BROWSER, PYTHON
from gptjax.text.harmony.conversation import EarlierAnalysis, conversation, recipients, render
from gptjax.text.harmony.messages import DeveloperContent, Function, Message, Namespace, SystemContent
from gptjax.text.harmony.parsing import Event, StreamParser, parse
from gptjax.text.harmony.rendering import render_messages
from gptjax.text.harmony.special import missing_tokens

__all__ = [
    "BROWSER",
    "PYTHON",
    "DeveloperContent",
    "EarlierAnalysis",
    "Event",
    "Function",
    "Message",
    "Namespace",
    "StreamParser",
    "SystemContent",
    "conversation",
    "missing_tokens",
    "parse",
    "recipients",
    "render",
    "render_messages",
]
