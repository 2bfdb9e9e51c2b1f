"""Finds the checkpoint's directory or file for a name, a path or a Hub id."""

import difflib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from gptjax.checkpoints import foreign, safetensors, smollm2
from gptjax.checkpoints.manifest import is_converted
from gptjax.errors import CheckpointError
from gptjax.support.files import MISSING, read_bytes
from gptjax.support.installation import with_extra
from gptjax.support.quoting import shown

DEMOS: Final = Path(__file__).resolve().parent.parent / "demo"

FILES: Final = ("*.json", "*.txt", "*.safetensors", "*.model")  # what a checkpoint needs from a Hub repository
_REFERENCE_BYTES: Final = 4096  # the size limit for a cache file that names a commit
_HUB_ID: Final = re.compile(
    r"(?P<repo>(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95})(?:@(?P<revision>\w[\w./-]{0,99}))?", re.ASCII
)


def resolve(name: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint, or its GGUF file.

    Args:
      name: tried in this order: a demo that comes with gptjax ("gpt2-tales"); a directory or a GGUF file; "smollm2"
        (see `gptjax.checkpoints.smollm2`); the id of a repository on the Hugging Face Hub, "gpt2" or
        "openai/gpt-oss-20b", with "@revision" if not the newest. A repository is looked up in the local Hub cache
        (HF_HUB_CACHE, HF_HOME) and otherwise downloaded, if the extra `hub` is installed and HF_HUB_OFFLINE is not set.

    Raises:
      CheckpointError: none of these exists; says what was tried and what to do.
    """
    if not isinstance(name, str | os.PathLike):
        raise CheckpointError(f"a checkpoint's name must be a string or a path, found {type(name).__name__}")
    text = os.fsdecode(name)
    if not text:
        raise CheckpointError(
            f"the checkpoint's name is empty; name a directory, a GGUF file, or a demo: {', '.join(demos())}"
        )
    if text in demos():
        return DEMOS / text
    try:
        path = Path(text).expanduser()
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except MISSING:
        if path.suffix.lower() == ".gguf":  # also the form of a Hub id, but never a repository with safetensors
            raise CheckpointError(f"{shown(path)} does not exist; check the path") from None
    except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown user's home, a NUL, a symlink loop
        fault = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(
            f"{shown(repr(text))} cannot be a path ({fault}); name a directory, a GGUF file or a demo"
        ) from None
    else:
        if not is_directory:
            return _file(path)
        foreign.refuse_adapter(path)
        foreign.refuse_only_gguf(path)
        return path
    if text == smollm2.NAME:
        return smollm2.find()
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text or isinstance(name, os.PathLike):
        raise CheckpointError(_not_found(text, is_id=False))
    repo, revision = match["repo"], match["revision"] or "main"
    found = cached(repo, revision)
    found = found if found is not None else _download(text, repo, revision)
    foreign.refuse_adapter(found)
    return found


def demos() -> list[str]:
    """The names of the checkpoints that come with gptjax."""
    return sorted(path.name for path in DEMOS.iterdir() if path.is_dir()) if DEMOS.is_dir() else []


def cached(repo: str, revision: str = "main") -> Path | None:
    """The directory of a repository in the local Hub cache, if it has a config and weights, or an adapter.

    The environment is read on each call: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub.
    """
    root = _cache() / f"models--{repo.replace('/', '--')}"
    reference = root / "refs" / revision
    data = read_bytes(reference, _REFERENCE_BYTES)
    try:
        commit = revision if data is None else data.decode().strip()
    except UnicodeDecodeError:
        return None
    if re.fullmatch(r"[0-9a-zA-Z]+", commit) is None:  # it becomes part of a path
        return None
    snapshot = root / "snapshots" / commit
    if os.path.lexists(snapshot / foreign.ADAPTER):
        return snapshot
    return snapshot if os.path.exists(snapshot / "config.json") and _has_weights(snapshot) else None


def _has_weights(snapshot: Path) -> bool:
    """Whether a snapshot has all its weights: an interrupted download leaves an index and some of its files."""
    if is_converted(snapshot) or os.path.exists(snapshot / safetensors.SINGLE):
        return True
    try:
        names = set(safetensors.read_index(snapshot / safetensors.INDEX).values())
    except CheckpointError:
        return False
    return all(re.fullmatch(r"[^/\\\0]+", name) and os.path.exists(snapshot / name) for name in names)


def _cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _download(text: str, repo: str, revision: str) -> Path:
    if _offline():
        raise CheckpointError(f"{_not_found(text, is_id=True)}\nnothing is downloaded because HF_HUB_OFFLINE is set")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{_not_found(text, is_id=True)}\nor let gptjax download it: {with_extra('hub')}"
        ) from None
    try:
        # "*" in these patterns matches "/" too, so "*/*" leaves out folders such as `original/` and `onnx/`.
        snapshot = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*/*"], cache_dir=_cache()
        )
    except Exception as error:  # from the network, the Hub, authorisation or the disk
        summary = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{text} could not be downloaded ({type(error).__name__}: {summary})\n{_not_found(text, is_id=True)}"
        ) from error
    return Path(snapshot)


def _file(path: Path) -> Path:
    """The path of a GGUF file. Raises `CheckpointError` for others, and says what to name instead."""
    if foreign.is_gguf(path):
        return path
    foreign.refuse(path)
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(f"{path} is a weights file; name its directory: {path.absolute().parent}")
    raise CheckpointError(
        f"{path} is a file, but not a GGUF file; name a checkpoint's directory (config.json, *.safetensors, "
        "tokenizer.json) or a GGUF file"
    )


def _not_found(text: str, *, is_id: bool) -> str:
    tried = [f"{shown(repr(text))} is neither a demo ({', '.join(demos()) or 'none is installed'}) nor a directory"]
    close: Iterable[str] = difflib.get_close_matches(text.lower(), [*demos(), smollm2.NAME], n=3)
    tried += [f"did you mean {name!r}?" for name in close]
    if not is_id:
        tried.append("it does not look like a Hub id (`name` or `owner/name`) either; check the path")
        return "; ".join(tried)
    repo, _, revision = text.partition("@")
    where = f"{repo} at revision {revision}" if revision else repo
    tried.append(
        f"the Hub cache at {_cache()} has no repository with this id that has a config and weights\n"
        f"to use {where} from the Hub, download these files from https://huggingface.co/{repo} to a new directory\n"
        "  config.json\n  model.safetensors (or model.safetensors.index.json and all files that it names)\n"
        "  tokenizer.json (or vocab.json and merges.txt)\n  generation_config.json, tokenizer_config.json, if present\n"
        "and name that directory; or download one GGUF file, if it has any, and name that file"
    )
    return "; ".join(tried)
