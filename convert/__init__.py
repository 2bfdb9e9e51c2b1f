"""Converts Hugging Face and OpenAI checkpoints to parameters or to a converted directory, and exports them again.

    convert.convert("models/gpt2", "models/gpt2-jax")
    convert.verify("models/gpt2-jax")
    convert.export("models/gpt2-jax", "models/gpt2-again")

The same on the command line: python -m convert --help. Importing this package imports nothing else; names are looked up
on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from convert.conversion import Summary, convert
    from convert.exporting import export
    from convert.sources import open_params, stored_dtypes
    from convert.verification import Verified, verify

_HOMES: Final = {
    **dict.fromkeys(("Summary", "convert"), "convert.conversion"),
    **dict.fromkeys(("open_params", "stored_dtypes"), "convert.sources"),
    "export": "convert.exporting",
    **dict.fromkeys(("Verified", "verify"), "convert.verification"),
}
__all__ = [
    "DTYPES",
    "Summary",
    "Verified",
    "convert",
    "export",
    "open_params",
    "stored_dtypes",
    "verify",
]

DTYPES: Final = ("float32", "bfloat16", "float16")  # the dtypes that weights can be converted to


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'convert' has no attribute {name!r}")
