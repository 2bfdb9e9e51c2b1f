"""Runs requests to completion on an engine's slots."""

from collections.abc import Callable, Iterable, Iterator

from gptjax.engine.engine import Engine
from gptjax.engine.output import Chunk, Decoder, Output
from gptjax.engine.request import Request


def generate(
    engine: Engine, requests: Iterable[Request], detokenizer: Callable[[], Decoder] | None
) -> Iterator[tuple[int, Chunk]]:
    """Yields (request number, chunk), token by token, until every request has ended.

    A request joins as soon as a slot is free. Closing the iterator frees the slots.

    Args:
      requests: checked, with seeds.
      detokenizer: makes a new detokenizer for each request; None for token ids only.
    """
    waiting = list(enumerate(requests))[::-1]
    running: dict[int, tuple[int, Output]] = {}  # by slot
    try:
        while waiting or running:
            for slot in engine.free_slots[: len(waiting)]:
                number, request = waiting.pop()
                fresh = detokenizer() if detokenizer is not None else None
                running[slot] = number, Output(request, max_length=engine.max_length, detokenizer=fresh)
                engine.admit(slot, request)
            for token in engine.step():
                number, output = running[token.slot]
                chunk = output.push(token)
                if chunk.completion is not None:
                    engine.release(token.slot)
                    del running[token.slot]
                yield number, chunk
    finally:
        for slot in running:
            engine.release(slot)
