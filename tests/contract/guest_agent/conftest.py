"""The two agents that must behave alike: the real qemu-ga on a host socket, and the fake one."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Protocol

import pytest

from tests.framework.fake_agent import FakeAgent

TIMEOUT_S = 60
"""For what takes milliseconds where nothing else runs."""

# The only commands that the real agent may run on the machine of whoever runs the tests.
_HARMLESS = {
    "guest-ping",
    "guest-info",
    "guest-sync",
    "guest-sync-delimited",
    "guest-get-time",
    "guest-get-host-name",
    "guest-get-timezone",
    "guest-get-osinfo",
    "guest-network-get-interfaces",
    "guest-fsfreeze-status",
    "guest-exec",
    "guest-exec-status",
}


class Peer(Protocol):
    """An agent that a test can stop and start."""

    path: Path

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def restart(self) -> None: ...


class StartPeer(Protocol):
    def __call__(self, *, blocked: Collection[str] = (), frozen: bool = False) -> Awaitable[Peer]: ...


class QemuGa:
    """The real qemu-ga, with a unix socket in place of a port in a guest."""

    def __init__(
        self,
        path: Path,
        *,
        blocked: Collection[str] = (),
        frozen: bool = False,
        harmless: Collection[str] = _HARMLESS,
    ) -> None:
        self.path = path
        self._frozen = frozen
        # Debian has the agent in /usr/sbin, which an ordinary user's PATH lacks.
        self._program = shutil.which("qemu-ga", path="/usr/sbin:/usr/bin:/usr/local/bin")
        assert self._program, "qemu-ga is missing: install the package qemu-guest-agent"
        known = subprocess.run([self._program, "-b", "help"], check=True, capture_output=True, text=True).stdout.split()
        self._blocked = (set(known) - set(harmless)) | set(blocked)

    async def start(self) -> None:
        state = self.path.parent
        if self._frozen:
            # With this file the agent believes that its predecessor froze the file systems; nothing is frozen.
            (state / "qga.state.isfrozen").touch()
        assert self._program
        arguments = ["-m", "unix-listen", "-p", str(self.path), "-t", str(state), "-f", str(state / "pid")]
        self._process = await asyncio.create_subprocess_exec(
            self._program, *arguments, "-b", ",".join(sorted(self._blocked)), stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(TIMEOUT_S):
            while not self._listens():
                assert self._process.returncode is None, "qemu-ga ended instead of listening"
                await asyncio.sleep(0.005)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.path))
            except OSError:
                return False
        return True

    async def stop(self) -> None:
        # A frozen agent ignores SIGTERM.
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        async with asyncio.timeout(TIMEOUT_S):
            await self._process.wait()

    async def restart(self) -> None:
        await self.stop()
        await self.start()


@pytest.fixture(params=[QemuGa, FakeAgent], ids=["qemu-ga", "fake"])
async def start_peer(request: pytest.FixtureRequest) -> AsyncIterator[StartPeer]:
    kind: Callable[..., Peer] = request.param
    async with contextlib.AsyncExitStack() as stack:

        async def start(*, blocked: Collection[str] = (), frozen: bool = False) -> Peer:
            # Socket paths hold 107 bytes, so this is not pytest's own directory.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmherd-")))
            peer = kind(folder / "agent.sock", blocked=blocked, frozen=frozen)
            await peer.start()
            stack.push_async_callback(peer.stop)
            return peer

        yield start


@pytest.fixture
async def peer(start_peer: StartPeer) -> Peer:
    return await start_peer()
