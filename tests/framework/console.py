"""A guest's serial console: a shell in the guest that needs nothing of the guest's agent."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TIMEOUT_S = 60.0


class Console:
    """A shell on the serial console, of the user who is logged in there.

    It is read all the time, since a guest stands still that has more to say than a few hundred bytes.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)  # it may be silent for as long as it likes: who waits for something has a deadline
        self._connection = connection
        self._said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._heard = b""
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError):  # QEMU may have ended before
            self._connection.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        self._connection.close()

    def type(self, line: str) -> None:
        """Enters a line, which the console echoes."""
        self._connection.sendall(line.encode() + b"\r")

    def hear(self, words: str) -> None:
        """Waits until the console says this, which must not stand like that in what was typed."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while words.encode() not in self._heard:
            said = self._said.get(timeout=max(0.0, deadline_s - time.monotonic()))
            assert said, f"the console was closed before {words!r}; heard {self._heard!r}"
            self._heard += said
        self._heard = self._heard.split(words.encode(), 1)[1]

    def _listen(self) -> None:
        with contextlib.suppress(ConnectionError):
            while said := self._connection.recv(65536):
                self._said.put(said)
        self._said.put(b"")


@contextlib.contextmanager
def console_at(path: Path) -> Iterator[Console]:
    """The console on this socket of QEMU's, once its shell answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        with contextlib.closing(Console(connection)) as console:
            console.type("echo at''tached")
            console.hear("attached")
            yield console
