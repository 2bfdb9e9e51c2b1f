"""The known chat formats, and which one a tokenizer's template means.

A template is recognised by its exact text, never executed: `TEMPLATES` has the SHA-256 of each, without the newline at
its end, which jinja drops as well. tests/data/chat_templates has the texts and says where they were published.
"""

import hashlib
from functools import partial
from typing import Final

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.chat_formats.chatml import END, START, chatml
from gptjax.text.chat_formats.harmony import Harmony
from gptjax.text.chat_formats.interface import ChatFormat
from gptjax.text.chat_formats.llama2 import BOS, EOS, llama2, mistral, zephyr
from gptjax.text.chat_formats.llama3 import llama3, llama31
from gptjax.text.chat_formats.qwen3 import qwen3
from gptjax.text.chat_formats.readers import read_calls, read_json_calls, read_thoughts_and_calls
from gptjax.text.chat_formats.text_format import TextFormat
from gptjax.text.harmony import missing_tokens
from gptjax.text.tokenizer import Tokenizer

_CHATML: Final = partial(TextFormat, marks=(START, END), ends=(END, "<|endoftext|>"), begin=START)
_LLAMA3: Final = partial(
    TextFormat,
    marks=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ends=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    begin="<|start_header_id|>",
)
_LLAMA31: Final = partial(_LLAMA3, options=frozenset(("tools", "current_date")), read=read_json_calls)
_LLAMA2: Final = partial(TextFormat, marks=(BOS, EOS), ends=(EOS,))
_ALL: Final[tuple[ChatFormat, ...]] = (
    Harmony(),
    _CHATML("chatml", chatml),
    _CHATML("smollm2", partial(chatml, default="You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
    _CHATML("qwen2", partial(chatml, default="You are a helpful assistant.")),
    _CHATML(
        "qwen2.5",
        partial(chatml, default="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        options=frozenset(("tools",)),
        read=read_calls,
    ),
    _CHATML("qwen3", qwen3, options=frozenset(("tools", "enable_thinking")), read=read_thoughts_and_calls),
    _LLAMA2("llama-2", llama2),
    _LLAMA3("llama-3", llama3),
    _LLAMA31("llama-3.1", llama31),
    _LLAMA31("llama-3.2", partial(llama31, default_date=None)),
    _LLAMA2("mistral-v0.1", partial(mistral, after=" ")),
    _LLAMA2("mistral-v0.2", mistral),
    TextFormat("zephyr", zephyr, marks=(EOS,), ends=(EOS,)),
)
FORMATS: Final = {known.name: known for known in _ALL}
TEMPLATES: Final[dict[str, str]] = {}


def fingerprint(template: str) -> str:
    """The SHA-256 of a template, without the newline at its end."""
    return hashlib.sha256(template.removesuffix("\n").encode(errors="surrogatepass")).hexdigest()


def choose_format(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat:
    """The chat format of a tokenizer.

    Harmony is recognised by its special tokens, any other format by the tokenizer's chat template.

    Args:
      name: a key of `FORMATS` to take instead.

    Raises:
      RequestError: an unknown name, a tokenizer that lacks the format's special tokens, or one whose format is not
        known; says which formats there are.
    """
    if name is not None:
        if name not in FORMATS:
            raise RequestError(f"unknown chat format {quoted(name)}; choose one of {', '.join(FORMATS)}")
        FORMATS[name].check(tokenizer)
        return FORMATS[name]
    missing = missing_tokens(tokenizer)
    if not missing:
        return FORMATS["harmony"]
    other = f"name one with --chat-format, or chat_format= in gptjax.load: {', '.join(FORMATS)}"
    if tokenizer.chat_template is None:
        raise RequestError(
            "this model has no chat format: its tokenizer has no chat template, and it lacks harmony's special tokens "
            f"{', '.join(missing)}; give the model a plain prompt instead of a conversation, or, if it was trained to "
            f"chat, {other}"
        )
    digest = fingerprint(tokenizer.chat_template)
    if digest not in TEMPLATES:
        raise RequestError(
            f"gptjax does not know the tokenizer's chat template (its SHA-256 begins with {digest[:12]}), and executes "
            f"none: if you know which format the model was trained with, {other}"
        )
    known = FORMATS[TEMPLATES[digest]]
    known.check(tokenizer)
    return known
