"""Plots are drawn into files: what can go wrong is said before the work that they show is done."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Final

from gptjax.errors import RequestError
from gptjax.support.installation import with_extra

_FORMATS: Final = (".png", ".pdf", ".svg")


def check_plot(path: str | Path) -> None:
    """Checks that a plot can be drawn into this file.

    Raises:
      RequestError: matplotlib is not installed, or the file's ending or directory is not one that will do.
    """
    path = Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"a plot needs matplotlib, which is not installed: {with_extra('plot')}")
    if path.suffix.lower() not in _FORMATS:
        raise RequestError(f"{path} does not end as a picture does; name it .png, .pdf or .svg")
    if not os.path.isdir(path.absolute().parent):
        raise RequestError(f"the directory of {path} does not exist; create it first")


def save_plot(figure: Any, path: str | Path) -> None:
    """Writes a Matplotlib figure in the format of the file's ending. Raises `RequestError` if it cannot be written."""
    try:
        figure.savefig(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}); name another file") from None
