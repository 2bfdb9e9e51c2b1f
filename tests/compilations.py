"""What is compiled, from a cache on disk or anew, while something runs."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled in the body, by all threads."""
    compiled: list[str] = []

    def listen(name: str, seconds: float, **_: object) -> None:
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.clear_event_listeners()
