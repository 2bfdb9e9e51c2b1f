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
    """One process: every `count`-th client, or request."""
    endpoint = Endpoint(urlsplit(url), api_key)
    connection.send("ready")
    start = connection.recv()
    time.sleep(max(0.0, start - time.monotonic()))
    computed = time.process_time()
    mine = range(index, load.requests, count)
    work = _at_rate(endpoint, load, mine, start) if load.clients is None else _closed(endpoint, load, index, count)
    records = asyncio.run(work)
    busy = (time.process_time() - computed) / max(time.monotonic() - start, 1e-9)
    connection.send((records, busy))


async def _closed(endpoint: Endpoint, load: Load, index: int, count: int) -> list[Record]:
    """Clients that send a request when they have the answer to the last one."""
    assert load.clients is not None

    async def client(number: int) -> list[Record]:
        mine = range(number, load.requests, load.clients or 1)
        return [await completion(endpoint, load.body(request), timeout=load.timeout) for request in mine]

    found = await asyncio.gather(*(client(number) for number in range(index, load.clients, count)))
    return [record for records in found for record in records]


async def _at_rate(endpoint: Endpoint, load: Load, mine: Sequence[int], start: float) -> list[Record]:
    """Requests that come when they come, however many are still open."""
    arrivals = load.arrivals()

    async def later(number: int) -> Record:
        await asyncio.sleep(max(0.0, start + arrivals[number] - time.monotonic()))
        return await completion(endpoint, load.body(number), timeout=load.timeout)

    return list(await asyncio.gather(*(later(number) for number in mine)))
