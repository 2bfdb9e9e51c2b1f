"""Converts Hugging Face and OpenAI checkpoints to parameters or to a converted directory.

    convert.convert("models/gpt2", "models/gpt2-jax")
    python -m convert models/gpt2 models/gpt2-jax

Importing this package imports nothing else; names are looked up on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from convert.conversion import Summary, convert, open_params, stored_dtypes, stream_params

__all__ = ["DTYPES", "Summary", "convert", "open_params", "stored_dtypes", "stream_params"]

DTYPES: Final = ("float32", "bfloat16", "float16")  # the dtypes that weights can be converted to


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("convert.conversion"), name)
    raise AttributeError(f"module 'convert' has no attribute {name!r}")
