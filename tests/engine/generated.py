"""Runs requests to completion on an engine."""

from collections.abc import Callable, Iterable, Iterator

from gptjax.engine.engine import Engine
from gptjax.engine.output import Chunk, Decoder, Output
from gptjax.engine.request import Request


def generate(
    engine: Engine, requests: Iterable[Request], detokenizer: Callable[[], Decoder] | None
) -> Iterator[tuple[int, Chunk]]:
    """Yields (request number, chunk), token by token, until every request has ended.

    A request joins as soon as there is room. Closing the iterator ends those that are left.

    Args:
      requests: checked, with seeds.
      detokenizer: makes a new detokenizer for each request; None for token ids only.
    """
    waiting = list(enumerate(requests))[::-1]
    running: dict[int, tuple[int, Output]] = {}  # by the engine's number
    try:
        while waiting or running:
            for _ in range(min(engine.room, len(waiting))):
                number, request = waiting.pop()
                fresh = detokenizer() if detokenizer is not None else None
                output = Output(request, max_length=engine.max_length, detokenizer=fresh)
                running[engine.add(request)] = number, output
            for token in engine.step():
                number, output = running[token.request]
                chunk = output.push(token)
                if chunk.completion is not None:
                    engine.end(token.request)
                    del running[token.request]
                yield number, chunk
    finally:
        for each in running:
            engine.end(each)
