"""A server in a process of its own, and clients that cost little, so that its times are its own."""

import asyncio
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families


@dataclasses.dataclass(frozen=True)
class Process:
    """A server that is warm."""

    process: subprocess.Popen
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def health(self) -> dict[str, Any]:
        return httpx2.get(f"{self.address}/health", timeout=30).json()

    def memory(self) -> int:
        """Bytes that are resident, of all its processes."""
        return sum(each.memory_info().rss for each in family(self.process))

    def metrics(self) -> dict[tuple[str, ...], float]:
        """The samples of `/metrics`, by name and the values of their labels, in order of the labels."""
        text = httpx2.get(f"{self.address}/metrics", timeout=30).text
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value for sample in samples
        }


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Process]:
    """`gptjax serve` with gpt2-tales, once it compiles nothing more."""
    argv = [sys.executable, "-m", "gptjax", "serve", "-m", "gpt2-tales", "--dtype", "float32", "--port", "0", *options]
    path = folder / f"log-{time.monotonic_ns()}"
    with open(path, "w") as log, subprocess.Popen(argv, stderr=log) as process:
        try:
            server = Process(process, _port(process))
            wait(lambda: "all programs are compiled" in path.read_text(), 240)
            yield server
        finally:
            for each in family(process) if process.poll() is None else ():
                each.kill()


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A process, and those that it started."""
    first = psutil.Process(process.pid)
    return [first, *first.children()]


def _port(process: subprocess.Popen) -> int:
    """That on which a process listens."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for connection in (each for one in family(process) for each in one.net_connections("tcp")):
            if connection.status == psutil.CONN_LISTEN:
                return connection.laddr.port
        time.sleep(0.05)
    raise AssertionError("the server does not listen")


def wait(holds, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def body(number: int, **fields: Any) -> dict[str, Any]:
    """A request by its number: they differ in length, temperature and seed."""
    prompt = "The old king went down to the sea. " * (number % 4) + f"And {number}"
    return {"prompt": prompt, "temperature": (number % 3) / 2, "seed": number, "ignore_eos": True} | fields


def request(port: int, body: dict[str, Any], *, path: str = "/v1/completions", last: bool = True) -> bytes:
    """A request as bytes; after the last one of a connection, it is closed."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(data)}\r\n"
    return (head + ("Connection: close\r\n" if last else "") + "\r\n").encode() + data


async def ask(port: int, body: dict[str, Any], *, path: str = "/v1/completions") -> tuple[int, bytes]:
    """The status and the body of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(port, body, path=path))
        head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    found = re.match(rb"HTTP/1.1 (\d+) ", head)
    assert found is not None, head
    return int(found[1]), answer


async def ask_all(port: int, bodies: list[dict[str, Any]], *, at_once: int) -> list[tuple[int, bytes]]:
    """All answers, so many at once."""
    room = asyncio.Semaphore(at_once)

    async def one(body: dict[str, Any]) -> tuple[int, bytes]:
        async with room:
            return await ask(port, body)

    return await asyncio.gather(*map(one, bodies))
