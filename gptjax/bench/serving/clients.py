"""Clients in several processes, so that they can read more events than one of Python's threads can."""

import asyncio
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

from gptjax.bench.serving.load import Load
from gptjax.bench.serving.stream import Endpoint, Record, completion
from gptjax.errors import GptjaxError

_CLIENTS_OF_A_PROCESS = 32
_MOST_PROCESSES = 8
_START = 0.2  # seconds that processes have to hear when the clients begin


@dataclasses.dataclass(frozen=True)
class Measured:
    """What clients saw, and how much they had to do themselves."""

    records: tuple[Record, ...]
    busy: float  # the largest share of its time that one of the processes computed


def run(url: str, api_key: str | None, load: Load, processes: int | None = None) -> Measured:
    """Sends a load, and waits for all answers.

    Args:
      url: of the API, such as http://localhost:8000/v1.
      processes: by default one for each 32 clients, and at most one for each two of this machine's cores.
    """
    count = _processes(load) if processes is None else min(processes, load.requests)
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    started = []
    try:
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_process, args=(theirs, url, api_key, load, index, count), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            started.append(process)
        for connection in connections:
            connection.recv()  # it has imported what it needs
        start = time.monotonic() + _START
        for connection in connections:
            connection.send(start)
        parts = [connection.recv() for connection in connections]
    except EOFError:
        raise GptjaxError("a process of the load's clients ended early; see the messages above") from None
    finally:
        for process in started:
            process.terminate()
    return Measured(tuple(record for records, _ in parts for record in records), max(busy for _, busy in parts))


def _processes(load: Load) -> int:
    wanted = _MOST_PROCESSES if load.clients is None else -(-load.clients // _CLIENTS_OF_A_PROCESS)
    return max(1, min(wanted, (os.cpu_count() or 2) // 2, _MOST_PROCESSES, load.requests))


def _process(connection: Connection, url: str, api_key: str | None, load: Load, index: int, count: int) -> None:
    """One process: every `count`-th client, or request at a rate."""
    endpoint = Endpoint(urlsplit(url), api_key)
    # Made beforehand: random prompts take milliseconds, in which no event would be read.
    queues = [
        (after, [endpoint.completion(load.body(number)) for number in numbers])
        for after, numbers in load.queues()[index::count]
    ]
    connection.send("ready")
    start = connection.recv()
    time.sleep(max(0.0, start - time.monotonic()))
    computed = time.process_time()
    records = asyncio.run(_clients(endpoint, queues, start, load.timeout))
    busy = (time.process_time() - computed) / max(time.monotonic() - start, 1e-9)
    connection.send((records, busy))


async def _clients(
    endpoint: Endpoint, queues: Sequence[tuple[float, Sequence[bytes]]], start: float, timeout: float
) -> list[Record]:
    """Sends each queue's requests one after another, beginning so many seconds after the start."""

    async def client(after: float, requests: Sequence[bytes]) -> list[Record]:
        await asyncio.sleep(max(0.0, start + after - time.monotonic()))
        return [await completion(endpoint, request, timeout=timeout) for request in requests]

    found = await asyncio.gather(*(client(*queue) for queue in queues))
    return [record for records in found for record in records]
