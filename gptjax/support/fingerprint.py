"""What a compiled program depends on besides its own text: versions, sources, the device, and JAX's settings."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Final

import jax
import psutil

from gptjax._version import __version__

_ROOT: Final = Path(__file__).resolve().parents[2]
_SOURCES: Final = ("gptjax", "pallas_kernels")  # whatever traces a program is here
_PACKAGES: Final = re.compile(r"jax|flax|numpy|ml[-_]dtypes|nvidia", re.IGNORECASE)
# JAX's own variables are among its settings. Others say which GPU is used, how much of its memory, or what is logged.
_VARIABLES: Final = re.compile(r"XLA_FLAGS$|LIBTPU_INIT_ARGS$|NVIDIA_TF32_OVERRIDE$|TF_(?!CPP_)|MOSAIC_|TRITON_")
# Settings that say where programs are kept and what is logged. All others count, as JAX does not say what they change.
_NOT_SETTINGS: Final = re.compile(
    r"jax_(compilation_cache|persistent_cache|enable_compilation_cache|raise_persistent_cache|log_|logging_|debug_log_|"
    r"explain_cache|pprint|traceback_filtering|tracer_error|dump_ir|transfer_guard)"
)


def digest(*parts: str) -> str:
    """A name for some texts, and for everything that programs of this process depend on."""
    return _hash(*parts, *_of_process(), *_settings())


def sources_are_current() -> bool:
    """Whether the sources on disk are those that this process has read: none was written since it started."""
    try:
        _of_process()
        written = [path.stat().st_mtime for path in _source_files()]
    except OSError:  # one vanished meanwhile
        return False
    return bool(written) and max(written) < psutil.Process().create_time()


@functools.cache
def _of_process() -> tuple[str, ...]:
    """What stays the same in a process."""
    device = jax.devices()[0]
    return (
        __version__,
        _sources(),
        platform.python_version(),
        *_versions(),
        *(f"{name}={value}" for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)),
        device.platform,
        device.device_kind,
        device.client.platform_version,
        repr([getattr(device, name, None) for name in ("compute_capability", "core_count")]),
        f"{jax.device_count()} devices, {jax.process_count()} processes",
        _processor() if device.platform == "cpu" else "",
    )


def _settings() -> tuple[str, ...]:
    """JAX's settings as they are in this thread now."""
    values = jax.config.values
    names = [name for name in sorted(values) if not _NOT_SETTINGS.match(name)]
    return tuple(f"{name}={getattr(jax.config, name, values[name])!r}" for name in names)


def _versions() -> list[str]:
    """Of the installed packages that trace and compile."""
    found = importlib.metadata.distributions()
    return sorted({f"{each.name}=={each.version}" for each in found if _PACKAGES.match(each.name or "")})


def _sources() -> str:
    """A digest of the sources, which a developer may have edited."""
    return _hash(*(part for path in _source_files() for part in (str(path.relative_to(_ROOT)), path.read_bytes())))


def _source_files() -> list[Path]:
    found = [path for name in _SOURCES for path in sorted((_ROOT / name).rglob("*.py"))]
    return [path for path in found if path.is_file()]  # editors leave links to nowhere


def _processor() -> str:
    """XLA compiles for the processor's instructions, and divides work among as many threads as there are cores."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = re.findall(r"^(?:model name|flags|Features|CPU [a-z]+)\s*:.*$", text, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "\n".join(sorted({platform.machine(), *lines, f"{cores} cores"}))


def _hash(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()
