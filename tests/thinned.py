"""Parameters of which only some are in every run; the others have the mark `thorough`: see CONTRIBUTING.md."""

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(*values: Any) -> Any:
    """One set of parameters that shows more of what others show as well."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def thinned(every: Iterable[Any], *kept: Any) -> list[Any]:
    """All values of one parameter; those that are not among `kept` are thorough."""
    every = list(every)
    assert all(value in every for value in kept), "what is kept is not there"
    return [value if value in kept else thorough(value) for value in every]
