"""Bare QEMU: the very machine that vmherd would run, started from its plan, asked over a plain socket."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vmherd.image.registry import KernelImage

ANSWER_TIMEOUT_S = 60.0
CONNECT_INTERVAL_S = 0.002
DISK_BYTES = 1 << 30
DESCRIPTOR = re.compile(r"((?:\bfd|\bset)=|/dev/fdset/|/proc/self/fd/)(\d+)")
FIRST = 3
"""A plan numbers its descriptors from here: control, console and agent socket, kernel, initramfs, disk, console log."""


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

    def call(self, command: str, **arguments: object) -> Any:
        """One command and its answer. Written before the agent listens, it is answered as soon as it does."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        answer = json.loads(self._lines.readline())
        if "return" not in answer:
            raise RuntimeError(f"{command} was answered {answer}")
        return answer["return"]

    def ping(self) -> None:
        """One guest-ping and its answer."""
        self.call("guest-ping")

    def run(self, *argv: str) -> int:
        """Runs a program as the two commands allow it, asking for its end without a pause, and gives its exit code."""
        path, *words = argv
        pid = self.call("guest-exec", path=path, arg=words, **{"capture-output": True})["pid"]
        while not (status := self.call("guest-exec-status", pid=pid))["exited"]:
            pass
        exit_code: int = status["exitcode"]
        return exit_code

    def read_file(self, path: str, chunk_bytes: int) -> int:
        """Reads a file to its end and gives its size."""
        handle, size_bytes, eof = self.call("guest-file-open", path=path), 0, False
        while not eof:
            answer = self.call("guest-file-read", handle=handle, count=chunk_bytes)
            size_bytes += len(base64.b64decode(answer["buf-b64"]))
            eof = answer["eof"]
        self.call("guest-file-close", handle=handle)
        return size_bytes

    def write_file(self, path: str, size_bytes: int, chunk_bytes: int) -> None:
        """Writes a file of zeros."""
        handle = self.call("guest-file-open", path=path, mode="w")
        for _ in range(0, size_bytes, chunk_bytes):
            chunk = base64.b64encode(bytes(chunk_bytes)).decode()
            self.call("guest-file-write", handle=handle, **{"buf-b64": chunk})
        self.call("guest-file-close", handle=handle)

    def close(self) -> None:
        """Lets go of the socket."""
        self._lines.close()
        self._socket.close()


@contextlib.contextmanager
def machine(planned: Sequence[str], image: KernelImage) -> Iterator[Agent]:
    """Runs a planned command line with files of its own in the place of each descriptor, until the context is left."""
    with tempfile.TemporaryDirectory(prefix="vmherd-bare-") as own, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(_listening(Path(own) / name)) for name in ("qmp", "console", "agent")]
        files = [stack.enter_context(open(path, "rb")) for path in (image.kernel, image.initramfs)]
        disk = stack.enter_context(open(Path(own) / "disk", "wb+"))
        os.ftruncate(disk.fileno(), DISK_BYTES)
        log = stack.enter_context(open(Path(own) / "log", "ab"))
        ours = [opened.fileno() for opened in (*sockets, *files, disk, log)]
        process = subprocess.Popen(
            [DESCRIPTOR.sub(lambda found: f"{found[1]}{ours[int(found[2]) - FIRST]}", word) for word in planned],
            stdin=subprocess.DEVNULL,
            pass_fds=ours,
        )
        try:
            agent = Agent(Path(own) / "agent")
            yield agent
            agent.close()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener
