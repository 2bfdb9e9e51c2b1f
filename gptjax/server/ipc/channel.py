"""Messages between the two processes of a server, over a pair of sockets."""

import contextlib
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

_SIZE = struct.Struct("<Q")
_BUFFER = 1 << 20  # bytes


class Channel:
    """One end of the pair. Pickles what is sent, so the other end must be a process of ours.

    Any thread may send, and none waits for the other process. One at a time may receive.
    """

    def __init__(self, end: socket.socket) -> None:
        """An end of `socket.socketpair()`, which the channel closes."""
        self._socket = end
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._read_ahead = bytearray()
        self._lock = threading.Lock()
        self._waiting: deque[memoryview] = deque()  # what the socket had no room for, which a thread sends

    def send(self, message: Any) -> None:
        """Sends a message; it is lost if the other process has gone."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        frame = memoryview(_SIZE.pack(len(data)) + data)
        with self._lock:
            if not self._waiting:
                frame = frame[self._write(frame) :]
            if frame:
                self._waiting.append(frame)
                if len(self._waiting) == 1:
                    threading.Thread(target=self._send_waiting, name="gptjax-channel", daemon=True).start()

    def messages(self) -> Iterator[Any]:
        """What the other process sends, until it is gone."""
        while (message := self.receive()) is not None:
            yield message

    def receive(self) -> Any:
        """Waits for the next message. None: the other process is gone."""
        head = self._read(_SIZE.size)
        data = None if head is None else self._read(*_SIZE.unpack(head))
        return None if data is None else pickle.loads(data)

    def close(self) -> None:
        """Ends both sides' receiving."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end has gone
        finally:
            self._socket.close()  # once a thread that receives has left

    def _read(self, size: int) -> bytes | None:
        """Reads exactly `size` bytes, waiting for them. None: the other process has gone."""
        while len(self._read_ahead) < size:
            try:
                data = self._socket.recv(_BUFFER)
            except OSError:  # closed here, or the other process died
                data = b""
            if not data:
                return None
            self._read_ahead += data
        found = bytes(self._read_ahead[:size])
        del self._read_ahead[:size]
        return found

    def _write(self, frame: memoryview) -> int:
        """Writes what there is room for at once. Returns how much of it is done, which is all if nobody reads it."""
        try:
            return self._socket.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(frame)

    def _send_waiting(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # nobody reads it, or closed here
                self._socket.sendall(self._waiting[0])
            with self._lock:
                self._waiting.popleft()
                if not self._waiting:
                    return
