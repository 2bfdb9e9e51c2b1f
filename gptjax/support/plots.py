"""Saves plots, and checks beforehand that they can be saved."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Final

from gptjax.errors import RequestError
from gptjax.support.installation import with_extra

_FORMATS: Final = (".png", ".pdf", ".svg")


def check_plot(path: str | Path) -> None:
    """Checks that a plot can be saved to this file, before the work that it shows is done.

    Raises:
      RequestError: matplotlib is not installed, the file's suffix is unsupported or its directory does not exist.
    """
    path = Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"plotting needs matplotlib, which is not installed: {with_extra('plot')}")
    if path.suffix.lower() not in _FORMATS:
        raise RequestError(f"{path} is not the name of a picture; end it in .png, .pdf or .svg")
    if not os.path.isdir(path.absolute().parent):
        raise RequestError(f"the directory of {path} does not exist; create it first")


def save_plot(figure: Any, path: str | Path) -> None:
    """Saves a Matplotlib figure in the format of the file's suffix. Raises `RequestError` if it cannot be written."""
    try:
        figure.savefig(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}); name another file") from None
