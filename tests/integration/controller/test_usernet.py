"""The ports that QEMU binds for forwards, as a real one tells them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vmherd.controller.monitor import Monitor
from vmherd.controller.tasks import cancelled
from vmherd.controller.usernet import bound_ports
from vmherd.model.instance import NetworkInterface
from vmherd.model.lifecycle import Event
from vmherd.model.machine import PortForward, Protocol

pytestmark = pytest.mark.anyio
DEADLINE_S = 60.0
NETDEVS = (
    "user,id=net0",
    "user,id=net1,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp:127.0.0.1:0-:53,hostfwd=tcp:127.0.0.1:0-:22",
)
NICS = (
    NetworkInterface("user"),
    NetworkInterface(
        "user",
        forwards=(PortForward(Protocol.TCP, 22), PortForward(Protocol.UDP, 53), PortForward(Protocol.TCP, 22)),
    ),
)


class Told:
    """What QEMU says of its user-mode networks when it comes up."""

    def __init__(self) -> None:
        self.usernet: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.asks_usernet = True

    def qmp_up(self, *, found: Event, agent_open: bool, usernet: str) -> None:
        self.usernet.set_result(usernet)

    def qmp_down(self) -> None:
        pass

    def qmp_event(self, name: str, data: Mapping[str, object]) -> None:
        pass


@pytest.fixture
async def told() -> AsyncIterator[str]:
    told = Told()
    with TemporaryDirectory(prefix="u-") as directory:
        path = Path(directory) / "qmp.sock"
        qemu = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-S"),
            *("-qmp", f"unix:{path},server=on,wait=off"),
            *(word for netdev in NETDEVS for word in ("-netdev", netdev)),
            stderr=asyncio.subprocess.DEVNULL,  # that no device uses these networks
        )
        running = asyncio.create_task(Monitor(path, "web", told).run())
        try:
            async with asyncio.timeout(DEADLINE_S):
                yield await told.usernet
        finally:
            await cancelled(running)
            qemu.kill()
            await qemu.wait()


async def test_what_qemu_tells_is_what_it_has_bound(told: str) -> None:
    none, (first, datagrams, second) = bound_ports(told, NICS)
    assert none == ()
    assert first != second
    for port in (first, second):
        socket.create_connection(("127.0.0.1", port), DEADLINE_S).close()
    with socket.socket(type=socket.SOCK_DGRAM) as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", datagrams))
