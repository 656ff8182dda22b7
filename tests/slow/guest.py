"""What tests need of the Debian guest beside its agent's answers: its serial console, and word of the agent itself."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.framework.herd import HerdUnderTest

TIMEOUT_S = 60.0


class Console:
    """A shell on the serial console, of the user who is logged in there."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._heard = b""

    def type(self, line: str) -> None:
        """Enters a line."""
        self._connection.sendall(line.encode() + b"\r")

    def hear(self, words: str) -> None:
        """Waits until the shell says this, which must not stand like that in what was typed."""
        while words.encode() not in self._heard:
            received = self._connection.recv(65536)
            assert received, f"the console was closed before {words!r}; heard {self._heard!r}"
            self._heard += received
        self._heard = self._heard.split(words.encode(), 1)[1]


@contextlib.contextmanager
def console_at(path: Path) -> Iterator[Console]:
    """The console on this socket of QEMU's."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        console = Console(connection)
        console.type("echo at''tached")
        console.hear("attached")
        yield console


@contextlib.contextmanager
def agent_coming_back(herd: HerdUnderTest) -> Iterator[None]:
    """The agent goes in the body, and comes back in it or afterwards; this waits until vmherd has taken note of that.

    QEMU may tell up to a second late, and a call that is under way then ends as one of the agent that has gone.
    """
    before = _agent_reached(herd)
    yield
    herd.eventually(lambda: _agent_reached(herd) not in (None, before))


def _agent_reached(herd: HerdUnderTest) -> str | None:
    """When the instance reached the rung AGENT; None while it is not on it."""
    times = {step["rung"]: step["reachTime"] for step in herd.info()["readiness"]["steps"]}
    return times.get("AGENT")
