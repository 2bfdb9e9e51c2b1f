"""What `load` sets up in JAX, and what it asks of the devices. Nothing here happens at import."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.typing import DTypeLike

from gptjax.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
_LEAST_CACHED_COMPILATION = 0.2  # seconds: below it, compiling again is as fast as reading the file


def compute_dtype(dtype: DTypeLike | None) -> np.dtype:
    """The dtype to compute in; None is float32 on a CPU (bfloat16 is many times slower there), else bfloat16.

    Raises:
      ConfigError: not one of DTYPES.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    return found


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, unless JAX was told where already or GPTJAX_CACHE_DIR is set to nothing.

    The directory is $GPTJAX_CACHE_DIR/xla, by default ~/.cache/gptjax/xla.
    """
    given = os.environ.get("GPTJAX_CACHE_DIR")
    if given == "" or jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptjax" if given is None else Path(given)
    directory = base.expanduser() / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written to costs time, not results
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_CACHED_COMPILATION)


def available_memory() -> int:
    """Bytes that the default device (on a CPU, the machine) still has."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return int(psutil.virtual_memory().available)
