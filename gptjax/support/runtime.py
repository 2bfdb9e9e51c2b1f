"""Sets up JAX for `load`, and queries the devices. Nothing happens at import."""

import dataclasses
import os
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.typing import DTypeLike

from gptjax.errors import ConfigError, RequestError
from gptjax.support.quoting import quoted

DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = ("fp8",)
_LEAST_CACHED_COMPILATION = 0.01  # seconds: below that, compiling again is nearly as fast as reading the file
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name
_USUAL_FRACTION = 0.75  # of a GPU's memory, which JAX takes when it starts
_process: int | None = None  # the process that uses JAX: the one that loaded the first model
_executables: Path | None = None  # where executables are kept, once `enable_compilation_cache` has said so
_NO_LIMIT = 1 << 60  # version 1 of control groups writes "no limit" as the largest number of whole pages


def compute_dtype(dtype: DTypeLike | None) -> np.dtype:
    """The dtype to compute in; None means float32 on a CPU (where bfloat16 is many times slower), else bfloat16.

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
        raise ConfigError(f"dtype {quoted(dtype)} is not supported; choose one of {', '.join(DTYPES)}")
    return found


def cache_dtype(given: object) -> str | None:
    """What keys and values are kept in, checked; None is the dtype of the computation.

    Raises:
      ConfigError: not one of CACHE_DTYPES.
    """
    if given is not None and given not in CACHE_DTYPES:
        raise ConfigError(
            f"cache_dtype {quoted(given)} is not supported; choose {', '.join(CACHE_DTYPES)}, or leave it out to keep "
            "keys and values in dtype"
        )
    return None if given is None else str(given)


def check_process() -> None:
    """Raises `RequestError` in a process that was forked from one that loaded a model.

    JAX's threads do not survive a fork, and a computation in the new process would wait for them forever.
    """
    global _process
    if _process is None:
        _process = os.getpid()
    if _process != os.getpid():
        raise RequestError(
            f"process {os.getpid()} was forked from process {_process}, which uses JAX, and JAX's threads do not "
            "survive a fork; load and use models in one process only, or start processes without forking, such as with "
            "multiprocessing.get_context('spawn')"
        )


def enable_compilation_cache() -> None:
    """Caches compiled programs on disk, unless JAX's cache is already configured or GPTJAX_CACHE_DIR is empty.

    The directories are xla and executables in $GPTJAX_CACHE_DIR, by default ~/.cache/gptjax: JAX's cache, and
    `executables_directory`.
    """
    global _executables
    directory = own_cache_directory()
    if directory is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # an unwritable home costs time, not results
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_CACHED_COMPILATION)
        _executables = directory.parent / "executables"


def executables_directory() -> Path | None:
    """Where executables are kept for later processes; None if they are not."""
    return _executables if jax.config.values["jax_enable_compilation_cache"] else None


def own_cache_directory() -> Path | None:
    """Where gptjax caches compiled programs unless JAX is configured otherwise; None if GPTJAX_CACHE_DIR is empty."""
    given = os.environ.get("GPTJAX_CACHE_DIR")
    if given == "":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptjax" if given is None else Path(given)
    return base.expanduser() / "xla"


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """A device's memory in bytes; on a CPU, that of the machine, or of the container or job of this process."""

    device: str  # kind of device: "cpu", "NVIDIA H200"
    platform: str  # "cpu", "gpu"
    limit: int  # the most that may be used
    in_use: int  # on a GPU by JAX; on a CPU by every process that shares the limit
    available: int  # can still be allocated


def fraction() -> float:
    """The share of a GPU's memory that JAX takes when it starts, or at most takes without preallocation."""
    return float(next((given for name in _FRACTIONS if (given := os.environ.get(name))), _USUAL_FRACTION))


def reserve(share: float) -> None:
    """Lets JAX take at least this share of a GPU's memory. It reads the share once, when it starts.

    Raises:
      RequestError: JAX has started with less, or the environment says less.
    """
    from jax._src.xla_bridge import backends_are_initialized  # nothing public says so without starting JAX

    if share <= fraction():
        return
    if given := [name for name in _FRACTIONS if os.environ.get(name)]:
        raise RequestError(
            f"memory is {share}, but ${given[0]} gives JAX only {fraction()} of the GPU: set it to {share}, or unset it"
        )
    if not backends_are_initialized():
        os.environ[_FRACTIONS[1]] = str(share)
    elif jax.default_backend() != "cpu":
        raise RequestError(
            f"memory is {share}, but JAX has started and taken {fraction()} of the GPU: load the model before anything "
            f"else uses JAX, or set {_FRACTIONS[1]}={share} before Python starts"
        )


def whole_memory(device: DeviceMemory) -> int:
    """All bytes of a device, with those of a GPU that JAX does not take."""
    return device.limit if device.platform == "cpu" else int(device.limit / fraction())


def device_memory(device: jax.Device | None = None) -> DeviceMemory:
    """The current memory of a device, by default the default device."""
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        limit, in_use = int(stats["bytes_limit"]), int(stats["bytes_in_use"])
        return DeviceMemory(device.device_kind, device.platform, limit, in_use, max(limit - in_use, 0))
    system = psutil.virtual_memory()
    limits = [(int(system.total), int(system.available)), *cgroup_memory()]
    limit, available = (min(column) for column in zip(*limits, strict=True))
    return DeviceMemory(device.device_kind, device.platform, limit, limit - available, available)


def cgroup_memory(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, still available), in bytes, of each Linux control group that limits this process's memory.

    Reads both versions of control groups, and the process's own group with its ancestors, whose limits also apply.
    Files that cannot be read set no limit. `root` is the directory with /proc and /sys.
    """
    found = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            tops, files = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            tops, files = ["sys/fs/cgroup/memory"], ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the host's, of which only the top is visible: the container's own group.
        inner = PurePosixPath(path.lstrip("/"))
        groups = [root / top / each for top in tops for each in (inner, *inner.parents)]
        found += [pair for group in dict.fromkeys(groups) if (pair := _group_memory(group, *files)) is not None]
    return found


def _group_memory(group: Path, limit_file: str, usage_file: str) -> tuple[int, int] | None:
    limit, usage = (_text(group / name) or "" for name in (limit_file, usage_file))
    if not (limit.isdecimal() and usage.isdecimal()) or int(limit) >= _NO_LIMIT:  # or it says "max"
        return None
    stat = dict(line.split(" ", 1) for line in (_text(group / "memory.stat") or "").splitlines() if " " in line)
    # Cached pages of files, such as a checkpoint read before, count as usage but are freed on demand.
    cached = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("inactive_file", "active_file"))
    return int(limit), min(max(int(limit) - int(usage) + cached, 0), int(limit))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
