"""llguidance, which the extra "structured" brings."""

from functools import cache
from types import ModuleType
from typing import Any

from gptjax.errors import RequestError
from gptjax.support.installation import with_extra


@cache
def library() -> ModuleType:
    """The library. Raises `RequestError` if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise RequestError(
            f"structured output needs llguidance, of the extra 'structured': {with_extra('structured')}"
        ) from None
    return llguidance  # type: ignore[no-any-return, unused-ignore]


def limits() -> Any:
    """What a grammar may cost: a client sends it, and others wait while it is looked at."""
    # With more fuel than this, `((a{1000}){1000}){1000}` takes seconds instead of a tenth of one.
    return library().LLParserLimits(initial_lexer_fuel=250_000, step_lexer_fuel=200_000, verbose_errors=False)
