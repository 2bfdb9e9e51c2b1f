"""Small files of a checkpoint: text and JSON, with errors that say what to do."""

import json
from pathlib import Path
from typing import Any, NoReturn

from gptjax.errors import CheckpointError


def read_text(path: Path) -> str | None:
    """The text of a UTF-8 file, or None where there is no such file. Raises CheckpointError for an unreadable one."""
    try:
        text = path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        damaged(path, f"not valid JSON or text ({error})")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): see to its permissions.") from error
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there.")
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file. Raises CheckpointError for a damaged one."""
    text = read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        damaged(path, f"not valid JSON ({error})")
    if not isinstance(value, dict):
        damaged(path, f"it holds a JSON {type(value).__name__}, not an object")
    return value


def damaged(path: Path, what: str) -> NoReturn:
    """Raises the CheckpointError of a damaged file."""
    raise CheckpointError(f"{path} is damaged: {what}. Fetch it again.")
