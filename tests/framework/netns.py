"""Network namespaces for tests. One lives by its descriptors alone, so the host never sees it and nothing is left."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

CLONE_NEWNET = 0x40000000
TIMEOUT_S = 30.0

Result = TypeVar("Result")

_libc = ctypes.CDLL(None, use_errno=True)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")


class Namespace:
    """A network namespace, with its loopback up."""

    def __init__(self) -> None:
        self._descriptor = _in_thread(_new_namespace)
        self.ip("link", "set", "lo", "up")

    def close(self) -> None:
        """Lets go of it: with the last process and socket in it, it ends, and everything in it."""
        os.close(self._descriptor)

    @property
    def words(self) -> Sequence[str]:
        """What runs a program in here, before the program's own words."""
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self._descriptor}", "--")

    def run(self, *words: str, text: str = "") -> str:
        """Runs a program that must succeed, and gives what it wrote."""
        result = subprocess.run(
            [*self.words, *words], input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert result.returncode == 0, (words, result.stderr)
        return result.stdout

    def ip(self, *words: str) -> str:
        """Runs `ip`."""
        return self.run("ip", *words)

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function gives that is called in here: a socket that it opens stays in here."""

        def inside() -> Result:
            _check(_libc.setns(self._descriptor, CLONE_NEWNET))
            return function(*arguments)

        return _in_thread(inside)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in here, and so is all that it starts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(self._descriptor, CLONE_NEWNET))
            try:
                yield
            finally:
                _check(_libc.setns(before, CLONE_NEWNET))
        finally:
            os.close(before)

    def processes(self) -> list[str]:
        """Who is in here, for people."""
        inode, found = os.fstat(self._descriptor).st_ino, []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or nothing of ours
                if os.stat(process / "ns/net").st_ino == inode:
                    found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
        return found


@contextmanager
def own_network() -> Iterator[Namespace]:
    """The calling thread is in a namespace of its own, where at the end nobody may be left."""
    with namespaces(1) as [namespace]:
        with namespace.entered():
            yield namespace
        deadline_s = time.monotonic() + TIMEOUT_S
        while left := namespace.processes():  # who was ended may take a moment to go
            assert time.monotonic() < deadline_s, f"left in the namespace: {left}"
            time.sleep(0.02)


@contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    """Some namespaces, for the time of a test."""
    made = [Namespace() for _ in range(count)]
    try:
        yield made
    finally:
        for namespace in made:
            namespace.close()


def join(one: Namespace, name: str, address: str, other: Namespace, other_name: str, other_address: str) -> None:
    """Lays a wire between two namespaces, with an interface at each end."""
    one.ip("link", "add", name, "type", "veth", "peer", other_name, "netns", f"/proc/{os.getpid()}/fd/{_fd(other)}")
    for namespace, interface, its_address in ((one, name, address), (other, other_name, other_address)):
        namespace.ip("addr", "add", its_address, "dev", interface, "nodad")
        namespace.ip("link", "set", interface, "up")


def _fd(namespace: Namespace) -> int:
    return namespace._descriptor


def _new_namespace() -> int:
    _check(_libc.unshare(CLONE_NEWNET))
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _in_thread(function: Callable[[], Result]) -> Result:
    """Calls a function in a thread of its own, which may go to another namespace without the others."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(TIMEOUT_S)
    for error in errors:
        raise error
    return results[0]
