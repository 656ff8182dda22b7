"""Bare QEMU: the very machine that vmherd would run, started from its plan, asked over a plain socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ANSWER_TIMEOUT_S = 60.0
CONNECT_INTERVAL_S = 0.002
DISK_BYTES = 1 << 30


class Agent:
    """The guest agent on a plain socket, with nothing around it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        deadline_s = time.perf_counter() + ANSWER_TIMEOUT_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.perf_counter() > deadline_s:
                    raise
                time.sleep(CONNECT_INTERVAL_S)
        self._lines = self._socket.makefile("rb")

    def ping(self) -> None:
        """One guest-ping and its answer. Written before the agent listens, it is answered as soon as it does."""
        self._socket.sendall(b'{"execute":"guest-ping"}\n')
        answer = json.loads(self._lines.readline())
        if answer != {"return": {}}:
            raise RuntimeError(f"guest-ping was answered {answer}")

    def close(self) -> None:
        """Lets go of the socket."""
        self._lines.close()
        self._socket.close()


@contextlib.contextmanager
def machine(planned: Sequence[str], run_dir: Path, state_dir: Path) -> Iterator[Agent]:
    """Runs a planned command line with its files in a directory of its own, until the context is left."""
    with tempfile.TemporaryDirectory(prefix="vmherd-bare-") as own:
        directories = {str(run_dir / "instances"): own, str(state_dir / "instances"): own}
        argv = list(planned)
        for theirs, ours in directories.items():
            argv = [word.replace(f"{theirs}/{_uid(planned)}", ours) for word in argv]
        with open(Path(own) / "disk.raw", "wb") as disk:
            os.ftruncate(disk.fileno(), DISK_BYTES)
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        try:
            agent = Agent(Path(own) / "agent.sock")
            yield agent
            agent.close()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _uid(planned: Sequence[str]) -> str:
    return planned[planned.index("-uuid") + 1]
