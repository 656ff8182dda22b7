"""Where an agent is reached, and what a caller hears of an address where none is."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from tests.framework.fake_agent import FakeAgent, FakeAgentOnTcp
from vmherd.guest_agent import AgentNotConnected, AgentUnresponsive, GuestAgent, TcpAddress, UnixAddress, parse_address

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60
SHORT_S = 0.2


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/x.sock", UnixAddress("/run/x.sock")),
        ("x.sock", UnixAddress("x.sock")),
        ("./a:b.sock", UnixAddress("./a:b.sock")),
        ("unix:/run/x.sock", UnixAddress("/run/x.sock")),
        ("tcp:127.0.0.1:1234", TcpAddress("127.0.0.1", 1234)),
        ("tcp:localhost:1", TcpAddress("localhost", 1)),
        ("tcp:[::1]:65535", TcpAddress("::1", 65535)),
        ("tcp:[fe80::1%eth0]:1234", TcpAddress("fe80::1%eth0", 1234)),
        ("tcp:[localhost]:1", TcpAddress("localhost", 1)),
    ],
)
def test_what_is_an_address(text: str, address: UnixAddress | TcpAddress) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


def test_any_path_can_be_written() -> None:
    assert parse_address("unix:tcp:1") == UnixAddress("tcp:1")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no path of a socket"),
        ("unix:", "no path of a socket"),
        ("/run/\0", "no path of a socket"),
        ("127.0.0.1:1234", "neither unix: nor tcp:"),
        ("udp:127.0.0.1:1234", "neither unix: nor tcp:"),
        ("tcp:1234", "tcp:HOST:PORT"),
        ("tcp:localhost", "tcp:HOST:PORT"),
        ("tcp:::1:1234", r"tcp:\[HOST\]:PORT"),
        ("tcp:[::1]", r"tcp:\[HOST\]:PORT"),
        ("tcp:localhost:http", "tcp:HOST:PORT"),
        ("tcp:localhost:+1", "tcp:HOST:PORT"),
        ("tcp:localhost:٣", "tcp:HOST:PORT"),
        ("tcp:localhost:0", "0 is no port: they are 1 to 65535"),
        ("tcp:localhost:65536", "65536 is no port"),
        ("tcp:localhost:" + "9" * 5000, "tcp:HOST:PORT"),
        ("tcp::1234", "no name of a host"),
        ("tcp:[]:1234", "no name of a host"),
        ("tcp:a\0b:1234", "no name of a host"),
        (f"tcp:{'x' * 64}.example:1234", "no name of a host"),
    ],
)
def test_what_is_no_address(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_address(text)
    with pytest.raises(ValueError, match=complaint):
        GuestAgent(text)


@pytest.mark.parametrize("form", ["{}", "unix:{}"])
async def test_an_agent_is_reached_by_each_form_of_its_path(fake: FakeAgent, form: str) -> None:
    async with GuestAgent(form.format(fake.path)) as agent:
        await agent.ping(timeout_s=TIMEOUT_S)


async def test_a_path_is_never_taken_for_another_address(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    async with FakeAgent(Path("tcp:localhost:1")), GuestAgent(Path("tcp:localhost:1")) as agent:
        await agent.ping(timeout_s=TIMEOUT_S)


async def test_an_agent_behind_a_tcp_port(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeAgentOnTcp() as fake:
        for address in (f"tcp:localhost:{fake.port}", TcpAddress("127.0.0.1", fake.port)):
            async with GuestAgent(address) as agent:
                assert await agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S) == 5
                await fake.restart()
                assert await agent.execute("guest-sync", {"id": 6}, timeout_s=TIMEOUT_S) == 6


async def test_small_requests_are_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    options = []
    real = socket.socket.setsockopt

    def setsockopt(sock: socket.socket, *option: int) -> None:
        options.append(option)
        real(sock, *option)

    async with FakeAgentOnTcp() as fake, GuestAgent(TcpAddress("127.0.0.1", fake.port)) as agent:
        monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)
        await agent.ping(timeout_s=TIMEOUT_S)
    assert (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) in options


async def test_nobody_listens_on_the_port() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with GuestAgent(f"tcp:127.0.0.1:{port}") as agent:
            with pytest.raises(AgentNotConnected, match=f"tcp:127.0.0.1:{port}.*") as caught:
                await agent.ping(timeout_s=TIMEOUT_S)
    assert not caught.value.outcome_unknown


async def test_a_host_that_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with GuestAgent("tcp:nowhere.invalid:1") as agent:
        with pytest.raises(AgentNotConnected, match=r"tcp:nowhere\.invalid:1: .*not known"):
            await agent.ping(timeout_s=TIMEOUT_S)


async def test_the_deadline_covers_the_search_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> object:
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with GuestAgent("tcp:slow.invalid:1") as agent:
        with pytest.raises(AgentUnresponsive, match="nothing takes the connection"):
            await agent.ping(timeout_s=SHORT_S)


async def test_a_host_that_the_system_gave_up_is_not_called_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sock_connect(*_: object) -> None:
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", sock_connect)
    async with GuestAgent("tcp:127.0.0.1:1") as agent:
        with pytest.raises(AgentNotConnected, match="timed out"):
            await agent.ping(timeout_s=TIMEOUT_S)
