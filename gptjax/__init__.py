"""GPT-2, GPT-OSS, Llama, Mistral and Qwen in JAX: from a checkpoint or a GGUF file to text.

    import gptjax

    lm = gptjax.load("gpt2-tales")
    print(lm.generate("Once upon a time", max_tokens=64).text)

Importing this package or one of its modules imports nothing above that module; names are resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gptjax._version import __version__

if TYPE_CHECKING:
    from gptjax.api import load
    from gptjax.chat import ChatChunk, ChatCompletion
    from gptjax.engine.output import Chunk, Completion, Timings, Usage
    from gptjax.errors import CapacityError, CheckpointError, ConfigError, GptjaxError, RequestError
    from gptjax.language_model import LanguageModel
    from gptjax.structured import Grammar
    from gptjax.text import Tokenizer, load_tokenizer
    from gptjax.text.chat_formats import ToolCall

_HOMES = {
    "LanguageModel": "gptjax.language_model",
    "load": "gptjax.api",
    "ChatChunk": "gptjax.chat",
    "ChatCompletion": "gptjax.chat",
    "ToolCall": "gptjax.text.chat_formats",
    "Chunk": "gptjax.engine.output",
    "Completion": "gptjax.engine.output",
    "Timings": "gptjax.engine.output",
    "Usage": "gptjax.engine.output",
    "CapacityError": "gptjax.errors",
    "CheckpointError": "gptjax.errors",
    "ConfigError": "gptjax.errors",
    "GptjaxError": "gptjax.errors",
    "RequestError": "gptjax.errors",
    "Grammar": "gptjax.structured",
    "Tokenizer": "gptjax.text",
    "load_tokenizer": "gptjax.text",
}

__all__ = [
    "CapacityError",
    "ChatChunk",
    "ChatCompletion",
    "CheckpointError",
    "Chunk",
    "Completion",
    "ConfigError",
    "GptjaxError",
    "Grammar",
    "LanguageModel",
    "RequestError",
    "Timings",
    "Tokenizer",
    "ToolCall",
    "Usage",
    "__version__",
    "load",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gptjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
