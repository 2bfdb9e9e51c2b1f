"""Foreign checkpoints into parameters and into converted directories.

    convert.convert("models/gpt2", "models/gpt2-jax")
    python -m convert models/gpt2 models/gpt2-jax

Importing this package imports nothing; names are looked up when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from convert.conversion import Summary, convert, open_params, stored_dtypes, stream_params

__all__ = ["DTYPES", "Summary", "convert", "open_params", "stored_dtypes", "stream_params"]

DTYPES: Final = ("float32", "bfloat16", "float16")  # that weights can be converted to


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("convert.conversion"), name)
    raise AttributeError(f"module 'convert' has no attribute {name!r}")
