"""What the service manager is told, and what it leaves in the environment."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from vmherd.rpc import notify
from vmherd.rpc.notify import ServiceManager
from vmherd.rpc.serving import serve_until_signalled

pytestmark = pytest.mark.anyio

DEADLINE_S = 20.0


class Manager:
    """A service manager's socket."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address.replace("\0", "@")}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(address)

    async def hears(self) -> list[str]:
        async with asyncio.timeout(DEADLINE_S):
            return (await asyncio.get_running_loop().sock_recv(self.socket, 4096)).decode().split("\n")


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as directory:
        path = f"{directory}/notify"
        manager = Manager(path if request.param == "path" else f"\0{path}")
        with manager.socket:
            yield manager


async def test_a_manager_hears_when_it_serves_and_when_it_ends(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.environment["NOTIFY_SOCKET"])
    serving = asyncio.create_task(serve_until_signalled("serving on /r/s"))
    assert await manager.hears() == ["READY=1", "STATUS=serving on /r/s"]
    assert "NOTIFY_SOCKET" not in os.environ
    os.kill(os.getpid(), signal.SIGTERM)
    assert await manager.hears() == ["STOPPING=1", "STATUS=ending"]
    await serving


async def test_signs_of_life_come_while_the_event_loop_runs(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (manager.environment | {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}).items():
        monkeypatch.setenv(name, value)
    serving = asyncio.create_task(serve_until_signalled(""))
    assert await manager.hears() == ["READY=1", "STATUS="]
    for _ in range(3):
        assert await manager.hears() == ["WATCHDOG=1"]
    os.kill(os.getpid(), signal.SIGTERM)
    while (heard := await manager.hears()) == ["WATCHDOG=1"]:
        pass
    assert heard == ["STOPPING=1", "STATUS=ending"]
    await serving
    assert not os.environ.keys() & {"WATCHDOG_USEC", "WATCHDOG_PID"}
    with pytest.raises(BlockingIOError):
        manager.socket.recv(1)


def test_a_watchdog_is_ours_by_its_pid() -> None:
    environment = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "30000000"}
    assert ServiceManager.taken_from(dict(environment)) == ServiceManager("/n", 30.0)
    assert ServiceManager.taken_from(environment | {"WATCHDOG_PID": str(os.getpid())}) == ServiceManager("/n", 30.0)
    assert ServiceManager.taken_from(environment | {"WATCHDOG_PID": str(os.getppid())}) == ServiceManager("/n")
    assert ServiceManager.taken_from(environment | {"WATCHDOG_USEC": "soon"}) == ServiceManager("/n")


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234", "\0"])
def test_what_is_no_unix_socket_is_nobody(address: str) -> None:
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1", "PATH": "/bin"}
    assert ServiceManager.taken_from(environment) == ServiceManager()
    assert environment == {"PATH": "/bin"}


async def test_a_manager_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    with capture_logs() as logs:
        await ServiceManager(str(tmp_path / "gone")).tell(READY=1)
    assert [(log["event"], log["fields"], log["why"]) for log in logs] == [
        ("the service manager was not told", "READY=1", "[Errno 2] No such file or directory")
    ]


async def test_a_manager_that_does_not_listen_holds_up_nothing(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "SEND_TIMEOUT_S", 0.05)
    found = ServiceManager.taken_from(dict(manager.environment))
    with capture_logs() as logs:
        while not logs:
            await found.tell(WATCHDOG=1)
    assert logs[0]["why"] == "TimeoutError"
    assert await manager.hears() == ["WATCHDOG=1"]
