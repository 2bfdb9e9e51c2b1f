"""The known chat formats, and which one a tokenizer's template means.

A template is recognised by its exact text, never executed: `TEMPLATES` has the SHA-256 of each, without the newline at
its end, which jinja drops as well. tests/data/chat_templates has the texts and says where they were published.
"""

import difflib
import hashlib
from functools import partial
from typing import Final

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.chat_formats import deepseek
from gptjax.text.chat_formats.chatml import END, START, chatml
from gptjax.text.chat_formats.harmony import Harmony
from gptjax.text.chat_formats.interface import ChatFormat
from gptjax.text.chat_formats.json_calls import read_json_calls
from gptjax.text.chat_formats.llama2 import BOS, EOS, llama2, mistral, zephyr
from gptjax.text.chat_formats.llama3 import llama3, llama31
from gptjax.text.chat_formats.qwen3 import qwen3
from gptjax.text.chat_formats.qwq import qwq
from gptjax.text.chat_formats.tagged import read_calls, read_on, read_thoughts_and_calls
from gptjax.text.chat_formats.text_format import TextFormat
from gptjax.text.harmony import missing_tokens
from gptjax.text.tokenizer import Tokenizer

_TOOLS: Final = frozenset(("tools",))
_CHATML: Final = partial(TextFormat, marks=(START, END), ends=(END, "<|endoftext|>"), begin=START)
_LLAMA3: Final = partial(
    TextFormat,
    marks=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ends=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    begin="<|start_header_id|>",
)
_LLAMA31: Final = partial(_LLAMA3, options=frozenset(("tools", "current_date")), read=read_json_calls)
_LLAMA2: Final = partial(TextFormat, marks=(BOS, EOS), ends=(EOS,))
_DEEPSEEK: Final = partial(
    TextFormat,
    marks=(deepseek.BOS, deepseek.USER, deepseek.ASSISTANT, deepseek.END),
    ends=(deepseek.END,),
    begin=deepseek.USER,
    read=read_thoughts_and_calls,
)
_HELPFUL: Final = "You are a helpful assistant."
_QWQ_PREVIEW: Final = (
    "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
)
_ALL: Final[tuple[ChatFormat, ...]] = (
    Harmony(),
    _CHATML("chatml", chatml),
    _CHATML("smollm2", partial(chatml, default="You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
    _CHATML("qwen2", partial(chatml, default=_HELPFUL)),
    _CHATML(
        "qwen2.5",
        partial(chatml, default="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        options=_TOOLS,
        read=read_calls,
    ),
    _CHATML("qwen2.5-base", partial(chatml, default=_HELPFUL), options=_TOOLS, read=read_calls),
    _CHATML("qwen3", qwen3, options=frozenset(("tools", "enable_thinking")), read=read_thoughts_and_calls),
    _CHATML("qwen3-instruct", partial(qwen3, thinks=False), options=_TOOLS, read=read_calls),
    _CHATML("qwen3-thinking", partial(qwen3, opening="<think>\n"), options=_TOOLS, read=read_on),
    _CHATML("qwq", qwq, options=_TOOLS, read=read_on),
    _CHATML("qwq-first", partial(qwq, keeps_last=False), options=_TOOLS, read=read_on),
    _CHATML("qwq-preview", partial(chatml, default=_QWQ_PREVIEW), options=_TOOLS, read=read_calls),
    _CHATML("hermes-2", chatml, has_bos=True),
    _CHATML("hermes-3", partial(chatml, default=_HELPFUL), has_bos=True),
    _DEEPSEEK("deepseek-r1", deepseek.r1),
    _DEEPSEEK("deepseek-r1-thinking", partial(deepseek.r1, opening="<think>\n"), read=read_on),
    _DEEPSEEK("deepseek-r1-0528", deepseek.r1_0528),
    _LLAMA2("llama-2", llama2),
    _LLAMA3("llama-3", llama3),
    _LLAMA31("llama-3.1", llama31),
    _LLAMA31("llama-3.2", partial(llama31, default_date=None)),
    _LLAMA2("mistral-v0.1", partial(mistral, after=" ")),
    _LLAMA2("mistral-v0.2", mistral),
    TextFormat("zephyr", zephyr, marks=(EOS,), ends=(EOS,)),
)
FORMATS: Final = {known.name: known for known in _ALL}
TEMPLATES: Final = {
    "fcf7a096fe99a48fd9ad2b250bf9237e96e8f48bffec1c7ea4d3f225176cd40e": "chatml",
    "58c1a1f04baa7adaeaba1f90267c3d57d9396f0c1f0129bdde9e76d3c6784af7": "chatml",
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": "smollm2",
    "793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb": "qwen2",
    "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a": "qwen2.5",
    "4039eed0f28b7aaa337e70c76cfedba3271ee32505835a095a8c92e536b3c355": "qwen2.5-base",
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5": "qwen3",
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "qwen3",
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": "qwen3-instruct",
    "3802169b2a02b81e6adb7ab4f64f91ff02db753c8c3a64a01c35192d3a61d8d7": "qwen3-thinking",
    "0ea596a118301cd1017adceb54953b67baaa8f2cc6403f5944a33db9195d1691": "qwq-preview",
    "3487c45e3264dacd700300db2d9c63f97dc7fb68057c8cb805fb5dd5c6366811": "qwq-first",
    "cb2d7aa140bed098f4ac8ab1a403980e6768d58ec95ef701668fc7dd017e0762": "qwq",
    "a805e50fed68938a076b07e2e602639611b50b1ced0e50f11eb92f1ba25be4dc": "hermes-2",
    "9ff2eb30a1d3e937a88108d74b1ab940891be58aa742be4e8c0ce1c1ad90588e": "hermes-3",
    "b6835114b7303ddd78919a82e4d9f7d8c26ed0d7dfc36beeb12d524f6144eab1": "deepseek-r1",
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": "deepseek-r1-thinking",
    "53671bac29bcb3e1f95f51b8c77d85a6011b66dc38bd23dce64eef04384a976b": "deepseek-r1-0528",
    "e8d5b5a546d3f19df16a5320c614fab05bdc4edd50e850f1afd947b503ea41cf": "llama-2",
    "b48c47f6443892716176eb200bf4ef108f64e06ca26ed0fa8ebc0a4b3992fcb2": "llama-3",
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": "llama-3",
    "93c0e9aa3629bbd77e68dbc0f5621f6e6b23aa8d74b932595cdb8d64684526d7": "llama-3.1",
    "d82792f95932f1c9cef5c4bd992f171225e3bf8c7b609b4557c9e1ec96be819f": "llama-3.2",
    "7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495": "mistral-v0.1",
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7": "mistral-v0.2",
    "66291cf0045c2425a3a667cf3cbb7af2b11f09e025c02f97245323ab79119362": "zephyr",
}


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
            near = difflib.get_close_matches(str(name).lower(), FORMATS, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise RequestError(f"unknown chat format {quoted(name)}{meant}; choose one of {', '.join(FORMATS)}")
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
