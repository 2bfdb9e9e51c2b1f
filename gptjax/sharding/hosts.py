"""Several processes, usually one on each host, that run one model together.

JAX connects the processes and their devices (`jax.distributed`). Each process must dispatch the same programs in the
same order, and process 0 alone knows which, as it takes the requests. So before it dispatches anything, it sends what
that is to the others, over a TCP connection to each.

This is not a collective of JAX's such as `multihost_utils.broadcast_one_to_all`. That runs on the devices, in turn with
the steps, so process 0 would wait for each step before it can plan beyond the next. And while a server is idle, the
others would wait inside a collective, which NCCL and Gloo end with an error after some time.

A message is JSON, and with some an array of int32: what comes from the network is never unpickled. A connection must
begin with a secret, which process 0 keeps where only those that JAX has connected can read it. Nothing is encrypted,
nor is what NCCL and JAX's own coordinator exchange: use a network that you trust.
"""

import atexit
import contextlib
import hmac
import itertools
import json
import logging
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gptjax.errors import GptjaxError, RequestError
from gptjax.support.processes import leave

AUTO: Final = "auto"  # instead of an address: what the cluster's environment says
HEARTBEAT: Final = 30  # seconds without a sign of life from a process, after which JAX ends the others
_CONNECTING: Final = 60.0  # seconds, once JAX has connected all processes
_ENDING: Final = 5.0  # seconds
_NOTICING: Final = 1.0  # seconds
_SECRET: Final = 32  # bytes
_KEY: Final = "gptjax/plans"
_GREETING: Final = struct.Struct(f"<{_SECRET}sI")  # the secret, and who it is
_HEAD: Final = struct.Struct("<II")  # bytes of JSON, and of the array after it
_MOST: Final = 1 << 28  # bytes of each
_MEETING: Final = 86_400_000  # milliseconds: in between, JAX's heartbeats and the links see who is gone
_meetings = itertools.count()
_log = logging.getLogger(__name__)


class Link:
    """A connection between process 0 and another one."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setsockopt(
            socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
        )  # an idle server's connections are not to be forgotten

    def send(self, message: Any, array: np.ndarray | None = None) -> None:
        """Sends plain data, and an array of int32. Lost if the other process is gone: who receives sees that."""
        body = json.dumps([message, None if array is None else array.shape], separators=(",", ":")).encode()
        numbers = b"" if array is None else np.ascontiguousarray(array, np.int32).tobytes()
        with contextlib.suppress(OSError):
            self._socket.sendall(_HEAD.pack(len(body), len(numbers)) + body + numbers)

    def receive(self) -> tuple[Any, np.ndarray | None] | None:
        """Waits for a message. None: the other process is gone, or what it sent is not one."""
        try:
            sizes = _HEAD.unpack(_read(self._socket, _HEAD.size))
            if max(sizes) > _MOST:
                return None
            body, numbers = (_read(self._socket, size) for size in sizes)
            message, shape = json.loads(body)
            return message, None if shape is None else np.frombuffer(numbers, np.int32).reshape(shape)
        except (OSError, ValueError):
            return None


class Leader:
    """Process 0's side: what it sends, the others do. If one of them is gone, this process ends."""

    def __init__(self, links: dict[int, Link]) -> None:
        """Watches the links to the other processes, by their numbers."""
        self._links = links
        self._lock = threading.Lock()
        self._ended, self._in_step = False, True
        self._watching = [
            threading.Thread(target=self._watch, args=each, name="gptjax-peer", daemon=True) for each in links.items()
        ]
        for thread in self._watching:
            thread.start()

    def send(self, *message: Any, array: np.ndarray | None = None) -> None:
        """Sends plain data to all others."""
        with self._lock:
            for link in self._links.values():
                link.send(message, array)

    @contextlib.contextmanager
    def step(self, *message: Any, array: np.ndarray | None = None) -> Iterator[None]:
        """Sends what the others do while the body does the same.

        Raises:
          GptjaxError: an earlier body did not reach its end, such as by Ctrl-C. The others did: what is now dispatched
            here would meet something else there.
        """
        if not self._in_step:
            raise GptjaxError(
                "the processes are no longer in step, as something that all of them do was interrupted in this one: "
                "start them again"
            )
        self._in_step = False
        self.send(*message, array=array)
        yield
        self._in_step = True

    def end(self, reason: str | None = None) -> None:
        """Lets the others end. If there is a reason, they end at once, with an error; waits for that."""
        self._ended = True
        self.send("end", reason)
        for thread in self._watching if reason is not None else ():
            thread.join(_ENDING)  # without this process, JAX would end them with another reason

    def _watch(self, process: int, link: Link) -> None:
        found = link.receive()
        if not self._ended:
            _lose(f"process {process} {'is gone' if found is None else f'failed: {found[0]}'}")


class Follower:
    """The side of another process. If process 0 is gone, this one ends."""

    def __init__(self, process: int, link: Link) -> None:
        self.process = process
        self._link = link
        self._messages: queue.SimpleQueue[tuple[Any, np.ndarray | None]] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="gptjax-peer", daemon=True).start()

    def messages(self) -> Iterator[tuple[Any, np.ndarray | None]]:
        """What process 0 sends, until it ends."""
        while (found := self._messages.get())[0][0] != "end":
            yield found

    def fail(self, reason: str) -> None:
        """Says why this process ends."""
        self._link.send(reason)

    def _read(self) -> None:
        while (found := self._link.receive()) is not None:
            kind, *rest = found[0]
            if kind == "end" and rest[0] is not None:
                _lose(f"process 0 failed: {rest[0]}")
            self._messages.put(found)
            if kind == "end":
                return
        _lose("process 0 is gone")


_peer: Leader | Follower | None = None  # as JAX's own connection, there is one in a process


def current() -> Leader | Follower | None:
    """What this process is, if it has joined others."""
    return _peer


@contextlib.contextmanager
def joined(coordinator: str, processes: int | None = None, process: int | None = None) -> Iterator[bool]:
    """Joins other processes for as long as the body runs. Nothing may have used JAX's devices before.

    If the body raises an error in one of them, all end.

    Args:
      coordinator: an address of process 0, and a port that is free there, as in 10.0.0.1:1234; or `AUTO`: all of this
        is what the environment of Slurm, Open MPI or a TPU says.
      processes: how many there are.
      process: the number of this one.

    Yields:
      Whether this process follows process 0.

    Raises:
      RequestError: the others could not be reached.
    """
    global _peer
    _initialize(coordinator, processes, process)
    _peer = peer = _connected()
    try:
        yield isinstance(peer, Follower)
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, GptjaxError):
            time.sleep(_NOTICING)  # perhaps because a process is gone: that is the reason to give, and `_lose` gives it
        atexit.register(leave, 1)  # before JAX's own, which would wait for the others
        reason = str(error) or type(error).__name__
        peer.fail(reason) if isinstance(peer, Follower) else peer.end(reason)
        raise
    if isinstance(peer, Leader):
        peer.end()
    _peer = None
    jax.distributed.shutdown()  # waits for all: a process whose coordinator is gone would be ended as having failed


def meet() -> None:
    """Waits until all processes are here, for any time. Each calls it equally often."""
    from jax._src.distributed import global_state

    assert global_state.client is not None
    global_state.client.wait_at_barrier(f"{_KEY}/{next(_meetings)}", _MEETING)


def check_alone(mesh: Mesh | AbstractMesh | None, what: str) -> None:
    """Raises `RequestError` if a mesh has devices of several processes."""
    if isinstance(mesh, Mesh) and mesh.is_multi_process:
        raise RequestError(f"{what} does not work with devices of several processes yet")


def put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array that all processes have, on devices.

    For those of several processes, `jax.device_put` would first compare what they have, which takes 5 ms.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _initialize(coordinator: str, processes: int | None, process: int | None) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    is_known = coordinator != AUTO
    try:
        jax.distributed.initialize(
            coordinator if is_known else None,
            processes,
            process,
            # With it, a process would have one GPU only under Slurm, and wait for an MPI that need not be there.
            cluster_detection_method="deactivate" if is_known else None,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise RequestError(f"this process could not join the others: {error}") from error


def _connected() -> Leader | Follower:
    """Connects the processes that JAX has connected."""
    from jax._src.distributed import global_state  # nothing public has the address and what all processes can read

    store = global_state.client
    assert global_state.coordinator_address is not None and store is not None
    host = global_state.coordinator_address.rpartition(":")[0].strip("[]")
    if global_state.process_id == 0:
        with _listening(host) as server:
            secret = secrets.token_bytes(_SECRET)
            port = server.getsockname()[1]
            store.key_value_set_bytes(_KEY, secret + port.to_bytes(2, "little"))
            return Leader(_accepted(server, secret, global_state.num_processes))
    found = store.blocking_key_value_get_bytes(_KEY, int(_CONNECTING * 1000))
    try:
        end = socket.create_connection((host, int.from_bytes(found[_SECRET:], "little")), timeout=_CONNECTING)
        end.sendall(_GREETING.pack(found[:_SECRET], global_state.process_id))
    except OSError as error:
        raise RequestError(f"process 0 cannot be reached at {host}, from which plans come: {error}") from error
    end.settimeout(None)
    return Follower(global_state.process_id, Link(end))


def _listening(host: str) -> socket.socket:
    """On any free port: NCCL's are not fixed either."""
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family)
    except OSError:  # the address is that of a proxy, such as a service of Kubernetes
        return socket.create_server(("", 0))


def _accepted(server: socket.socket, secret: bytes, processes: int) -> dict[int, Link]:
    """The links to all others."""
    links: dict[int, Link] = {}
    until = time.monotonic() + _CONNECTING
    while len(links) < processes - 1:
        server.settimeout(max(0.1, until - time.monotonic()))
        try:
            end, _ = server.accept()
        except TimeoutError:
            missing = [str(each) for each in range(1, processes) if each not in links]
            raise RequestError(f"no connection came from process {', '.join(missing)}, to send plans to") from None
        end.settimeout(5.0)
        with contextlib.suppress(OSError):
            found, process = _GREETING.unpack(_read(end, _GREETING.size))
            if hmac.compare_digest(found, secret) and 0 < process < processes:
                end.settimeout(None)
                links[process] = Link(end)
                continue
        end.close()
    return links


def _read(end: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises `OSError` if they do not come."""
    found = bytearray()
    while len(found) < size:
        part = end.recv(min(size - len(found), 1 << 20))
        if not part:
            raise ConnectionResetError
        found += part
    return bytes(found)


def _lose(reason: str) -> None:
    """Ends the process: other threads may wait for a collective in which a process is missing, for ever."""
    _log.critical("this process cannot go on: %s", reason)
    leave(1)
