"""Recognises unsupported files by name and first bytes, so that the error can say what they are."""

import os
from pathlib import Path
from typing import Final

from gptjax.errors import CheckpointError
from gptjax.support.files import opened, read_json
from gptjax.support.quoting import shown

_PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_GGML_MAGICS: Final = frozenset({b"lmgg", b"fmgg", b"tjgg", b"algg", b"ggml", b"ggmf", b"ggjt", b"ggla"})
_ZIP_MAGIC: Final = b"PK\x03\x04"  # what torch.save writes: a zip archive with a pickle in it

GET_SAFETENSORS: Final = (
    "get the model's safetensors files instead: nearly every repository on the Hugging Face Hub has them "
    "(config.json, *.safetensors, tokenizer.json); or, if you trust the file, load the model once with transformers "
    "and call model.save_pretrained(directory)"
)
ADAPTER: Final = "adapter_config.json"
_ADAPTER_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_MERGE: Final = (
    "with PEFT: model = peft.AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload(), then "
    "model.save_pretrained(another_directory)"
)
_PICKLE: Final = "is a PyTorch pickle file; gptjax never opens those, since unpickling runs any code in the file"
_GGML: Final = "is a ggml file from before GGUF; gptjax does not read that format"
_GGUF: Final = "is a GGUF file; name the file itself, not its directory"


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF: by its first bytes, or by its name if it is damaged. Raises what `refusal` does."""
    with opened(path) as descriptor:
        head = os.pread(descriptor, 64, 0)
    return head[:4] == b"GGUF" or (path.suffix.lower() == ".gguf" and _by_magic(head) is None)


def refusal(path: Path) -> str | None:
    """Why a file cannot be read as weights, as a message; None if it can.

    Judged by its magic bytes first and then by its name, so that neither a pickle called `model.safetensors` nor a
    ggml file called `ggml-model.bin` is mistaken. Reads at most 64 bytes.

    Raises:
      FileNotFoundError, NotADirectoryError: the file does not exist.
      CheckpointError: it is not a regular file, or cannot be read.
    """
    with opened(path) as descriptor:
        head = os.pread(descriptor, 64, 0)
    reason = _by_magic(head) or _by_name(path)
    return None if reason is None else f"{path} {reason}"


def refuse(path: Path) -> None:
    """Raises `CheckpointError` if `refusal` gives a reason."""
    reason = refusal(path)
    if reason is not None:
        raise CheckpointError(reason)


def refuse_adapter(directory: Path) -> None:
    """Raises `CheckpointError` if a directory has an adapter (such as LoRA), with or without a model.

    An adapter is a difference from another checkpoint's weights. When transformers loads such a directory it applies
    the adapter, even if the directory also has a model's weights.
    """
    weights = [name for name in _ADAPTER_WEIGHTS if os.path.lexists(directory / name)]
    described = os.path.lexists(directory / ADAPTER)
    has_model = any(
        name.endswith((".safetensors", ".safetensors.index.json")) and name not in _ADAPTER_WEIGHTS
        for name in _listed(directory)
    )
    if not weights and (has_model or not described):
        return  # a merged model whose adapter_config.json was left behind
    base = (read_json(directory / ADAPTER) or {}).get("base_model_name_or_path") if described else None
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    if has_model:
        raise CheckpointError(
            f"{shown(directory)} has a model and an adapter{of} ({', '.join(weights)}), which gptjax does not apply; "
            f"merge it, or move adapter_* out of the directory to use the model without it; {_MERGE}"
        )
    raise CheckpointError(
        f"{shown(directory)} has only an adapter{of} (such as LoRA), which is a difference from a model, not a model; "
        f"merge it into its base model first; {_MERGE}"
    )


def refuse_only_gguf(directory: Path) -> None:
    """Raises `CheckpointError` if a directory has a GGUF file and no config.json; names the file."""
    files = sorted(name for name in _listed(directory) if name.lower().endswith(".gguf"))
    if files and not os.path.lexists(directory / "config.json"):
        one = ":" if len(files) == 1 else ", such as"
        raise CheckpointError(
            f"{shown(directory)} has GGUF but no config.json; name the file itself{one} {shown(directory / files[0])}"
        )


def _listed(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except (OSError, ValueError):  # reading the files will fail and say why
        return []


def _by_magic(head: bytes) -> str | None:
    if head[:4] in _GGML_MAGICS:
        return f"{_GGML}; {GET_SAFETENSORS}"
    if head[:4] == b"GGUF":
        return _GGUF
    if head.startswith(_ZIP_MAGIC):
        return f"{_PICKLE} (a zip archive, as torch.save writes it); {GET_SAFETENSORS}"
    # A safetensors header of 640 bytes also begins with 80 02; its JSON then begins at byte 8.
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{":
        return f"{_PICKLE} (pickle protocol {head[1]}); {GET_SAFETENSORS}"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory, or download the file again"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not weights: the download went wrong; download the file again"
    return None


def _by_name(path: Path) -> str | None:
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        return f"{_PICKLE} (judging by its name); {GET_SAFETENSORS}"
    return None
