"""Which implementation of an operation runs.

"auto" takes the best one there is for the operands; a named one runs or raises. Nothing that was asked for by name is
silently replaced by something else.
"""

from collections.abc import Callable, Mapping
from typing import Any

AUTO = "auto"
IMPLEMENTATIONS = (AUTO, "xla")


def choose(operation: str, implementation: str, available: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function to run. `available` is in order of preference: "auto" takes the first.

    Raises:
      ValueError: `implementation` names one that `operation` does not have.
    """
    if implementation == AUTO:
        return next(iter(available.values()))
    if implementation not in available:
        raise ValueError(f"{operation} has no implementation {implementation!r}; it has {', '.join(available)}")
    return available[implementation]
