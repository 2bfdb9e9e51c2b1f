"""Examines this installation and machine, and reports what is wrong with them. Changes nothing and never raises.

JAX and everything that needs it are imported inside the probes, so that a broken installation is reported.
"""

import dataclasses
import importlib.util
import os
import pkgutil
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from gptjax._version import __version__
from gptjax.support import installation

PACKAGES: Final = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "orbax-checkpoint", "safetensors", "psutil", "rich")
OPTIONAL: Final = ("huggingface_hub", "torch", "transformers", "jax-cuda13-plugin", "jax-cuda12-plugin")
VARIABLES: Final = re.compile(r"(GPTJAX|HF|JAX|XLA)_\w+|CUDA_VISIBLE_DEVICES|HUGGING_FACE_HUB_TOKEN|XDG_CACHE_HOME")
_SECRET: Final = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem, and what to do about it."""

    problem: str
    fix: str
    stops_work: bool  # whether gptjax cannot be used until it is fixed


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings: names and values for each topic, and the problems."""

    facts: dict[str, dict[str, Any]]  # keys ending in `_bytes` have values in bytes
    problems: tuple[Problem, ...]

    @property
    def works(self) -> bool:
        """Whether gptjax can be used, even if not at its best."""
        return not any(problem.stops_work for problem in self.problems)


Found = tuple[dict[str, Any], list[Problem]]


def examine() -> Report:
    """Runs all probes. A probe that fails is reported as a problem; the others still run."""
    facts, problems = {}, []
    for topic, probe in PROBES.items():
        try:
            facts[topic], found = probe()
        except Exception as error:  # whatever is broken: finding it is the point
            facts[topic] = {"failed": f"{type(error).__name__}: {error}"}
            found = [_failed(topic, error)]
        problems += found
    return Report(facts, tuple(problems))


def _failed(topic: str, error: Exception) -> Problem:
    text = f"{topic} could not be examined ({type(error).__name__}: {_first_line(error)})"
    if isinstance(error, ImportError):
        return Problem(text, installation.again(), stops_work=True)
    if topic == "devices":
        fix = "JAX does not start: check that JAX_PLATFORMS, if set, names an available platform and nvidia-smi works"
        return Problem(text, fix, stops_work=True)
    return Problem(text, f"read the message about {topic}; if it is a bug in gptjax, report it", stops_work=False)


def versions() -> Found:
    """Versions of Python and packages, and which are outside the ranges that gptjax requires."""
    facts: dict[str, Any] = {"python": platform.python_version(), "gptjax": __version__}
    for name in (*PACKAGES, *OPTIONAL):
        found = _version(name)
        if found is not None or name in PACKAGES:
            facts[name] = found or "not installed"
    problems = []
    for name, wanted, extra in _requirements():
        found = _version(name)
        if found is None and not extra:
            problems.append(Problem(f"{name} is not installed", f'pip install "{name}{wanted}"', stops_work=True))
        elif found is not None and not in_range(found, wanted):
            user = f'gptjax\'s extra "{extra}"' if extra else "gptjax"
            text = f"{user} needs {name} {wanted}, found {found}"
            problems.append(Problem(text, f'pip install "{name}{wanted}"', stops_work=not extra))
    return facts, problems


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[tuple[str, str, str]]:
    """(package, required versions, the extra that requires it or "") of each requirement."""
    matches = [
        (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(.*)", line), extra) for line, extra in installation.requirements()
    ]
    return [(match[1], match[2].replace(" ", ""), extra) for match, extra in matches if match is not None]


def in_range(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ">=0.10.2,<0.13". Suffixes after the numbers are ignored."""
    found = _numbers(version)
    for part in filter(None, wanted.split(",")):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)([\d.]+)", part)
        if match is None:
            continue  # an operator that pyproject.toml does not use
        limit = _numbers(match[2])
        width = max(len(found), len(limit))
        a, b = ((*each, *[0] * (width - len(each))) for each in (found, limit))
        holds = {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}
        if not holds[match[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match is not None else ()


def devices() -> Found:
    """The devices JAX uses, whether they compute correctly, and any graphics card that JAX does not use."""
    import jax
    import jax.numpy as jnp

    from gptjax.support.runtime import device_memory

    facts: dict[str, Any] = {}
    for device in jax.devices():
        memory = device_memory(device)
        facts[f"device {device.id}"] = f"{device.device_kind} ({device.platform})"
        facts |= {
            f"device {device.id} {name}_bytes": getattr(memory, name) for name in ("limit", "in_use", "available")
        }
        capability = getattr(device, "compute_capability", None)
        if capability is not None:
            facts[f"device {device.id} compute capability"] = str(capability)
    problems = []
    if (result := float((jnp.ones((8, 8)) @ jnp.ones((8, 8)))[0, 0])) != 8.0:
        text = f"the device computes wrong results: a sum of eight ones is {result}"
        problems.append(Problem(text, "restart the machine; if that does not help, check its hardware", True))
    cards = nvidia_cards()
    facts["NVIDIA cards"] = ", ".join(cards) or "none found"
    if cards and jax.default_backend() == "cpu":
        problems.append(_unused_card(cards[0]))
    return facts, problems


def nvidia_cards(root: Path = Path("/")) -> list[str]:
    """The names of this machine's NVIDIA cards, as reported by the driver, whether or not JAX can use them."""
    if command := shutil.which("nvidia-smi"):
        try:
            result = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            result = None
        names = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", result.stdout, re.M) if result is not None else []
        if names:
            return names
    found = []
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        match = re.search(r"^Model:\s*(.+)$", path.read_text(encoding="utf-8", errors="replace"), re.M)
        found.append(match[1].strip() if match is not None else "NVIDIA card")
    return found


def _unused_card(card: str) -> Problem:
    text = f"this machine has a GPU ({card}), but JAX computes on the CPU"
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted.startswith("cpu"):
        return Problem(f"{text} because JAX_PLATFORMS is {wanted}", "unset JAX_PLATFORMS", stops_work=False)
    if all(_version(f"jax-cuda{number}-plugin") is None for number in (12, 13)):
        return Problem(
            f"{text}: JAX's CUDA plugin is not installed", installation.with_extra("cuda13"), stops_work=False
        )
    fix = "run nvidia-smi: JAX for CUDA 13 needs driver version 580 or newer; see JAX's warnings when it starts"
    return Problem(text, fix, stops_work=False)


def compiled_programs() -> Found:
    """Where compiled programs are cached between processes."""
    import jax

    from gptjax.support.private_files import PrivateFiles
    from gptjax.support.runtime import own_cache_directory

    given = jax.config.values["jax_compilation_cache_dir"]
    directory = Path(given) if given else own_cache_directory()
    if directory is None:
        return {"directory": "none, because GPTJAX_CACHE_DIR is empty"}, []
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    files = [path for path in directory.glob("**/*") if path.is_file()] if directory.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    facts = {"directory": str(directory), "writable": writable, "files": len(files), "size_bytes": size}
    if writable:
        executables = directory.parent / "executables"
        why = None if given else PrivateFiles(executables, most_bytes=0).problem()
        text, fix = (
            f"compiled programs in {executables} are not read ({why})",
            f"remove it: rm -r {shlex.quote(str(executables))}",
        )
        return facts, [] if why is None else [Problem(text, fix, stops_work=False)]
    text = f"compiled programs cannot be saved in {directory}, so each process compiles them again"
    fix = "set GPTJAX_CACHE_DIR to a directory that you can write to"
    return facts, [Problem(text, fix, stops_work=False)]


def environment() -> Found:
    """The environment variables that change what gptjax and JAX do. Secrets are not shown."""
    facts = {
        name: "set, not shown" if _SECRET.search(name) else value
        for name, value in sorted(os.environ.items())
        if VARIABLES.fullmatch(name)
    }
    length = os.environ.get("GPTJAX_MAX_LENGTH", "")
    if length and not (length.isascii() and length.isdecimal() and int(length) > 0):
        text = f"GPTJAX_MAX_LENGTH is {length!r}, which is not a whole number of at least 1"
        return facts, [Problem(text, "unset GPTJAX_MAX_LENGTH, or set it to a number of positions", stops_work=True)]
    return facts, []


def implementations() -> Found:
    """The implementation each operation runs as here, and why."""
    import jax

    import pallas_kernels
    from pallas_kernels import dispatch

    preferred = dispatch.preferred()
    if preferred != dispatch.XLA:
        why = "for operands it supports, else xla"
    elif jax.default_backend() != "gpu":
        why = f"Pallas kernels need a GPU, and this is a {jax.default_backend()}"
    else:
        why = "Pallas kernels need an NVIDIA GPU, Ampere or newer"
    operations = {
        module.name: dispatch.has_kernel(module.name, preferred)
        for module in pkgutil.iter_modules(pallas_kernels.__path__)
        if module.ispkg and importlib.util.find_spec(f"pallas_kernels.{module.name}.api") is not None
    }
    has_none = f"xla (it has no {preferred} kernel)"
    return {
        name: f"{preferred} ({why})" if has or preferred == dispatch.XLA else has_none
        for name, has in operations.items()
    }, []


def demo() -> Found:
    """Whether the model that comes with gptjax is present and complete, and fits in memory."""
    from gptjax.checkpoints import hub
    from gptjax.diagnostics.info import describe
    from gptjax.errors import GptjaxError

    name = "gpt2-tales"
    directory = hub.DEMOS / name
    weights = directory / "model.safetensors"
    try:
        facts = describe(directory)
    except GptjaxError as error:
        return {name: "damaged"}, [Problem(f"{name} cannot be read: {_first_line(error)}", installation.again(), True)]
    shown = {key: facts[key] for key in ("checkpoint", "needed_bytes", "available_bytes", "fits")}
    if not weights.is_file() or weights.stat().st_size < facts["parameters"]:  # more than a byte for each number
        return shown, [Problem(f"{weights} is missing or truncated", installation.again(), stops_work=True)]
    if facts["fits"] != "yes":
        text = f"{name}, the smallest model, does not fit: {facts['fits']}"
        return shown, [Problem(text, "close other programs, or give this one more memory", stops_work=True)]
    return shown, []


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


PROBES: Final[dict[str, Callable[[], Found]]] = {
    "versions": versions,
    "devices": devices,
    "compiled programs": compiled_programs,
    "environment": environment,
    "implementations": implementations,
    "demo": demo,
}
