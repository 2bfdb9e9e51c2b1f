"""Harmony, the format that GPT-OSS reads and writes: conversations to token ids, and token ids back to messages.

The format is that of openai/harmony's `docs/format.md`; the exact text and tokens are those of openai-harmony 0.0.8.

    conversation.py  conversations in OpenAI's chat API to harmony messages (tools.py, fields.py); `render`
    rendering.py     harmony messages to token ids, in bounded time and memory (writer.py)
    schema.py        JSON schemas to the TypeScript-like form that describes tools
    parsing.py       token ids, one by one, to events and messages; header.py reads the headers, even malformed ones
    messages.py      the messages that they all use; special.py: the special tokens; builtin.py: the built-in tools
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
