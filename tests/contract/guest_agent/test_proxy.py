"""Several clients of the plain protocol on one agent, the same for the real agent and the fake one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.contract.guest_agent.conftest import TIMEOUT_S, Peer, QemuGa, StartPeer
from tests.framework.fake_agent import FakeAgent, Held, never, value
from vmherd.guest_agent import CommandDisabled, CommandFailed, CommandNotFound, GuestAgent, run
from vmherd.guest_agent import requests as bounds
from vmherd.guest_agent.proxy import Proxy, listening

pytestmark = pytest.mark.anyio

SHORT_S = 1.0
"""For what is never answered: what is takes milliseconds where nothing else runs."""

SYNC = b'\xff{"execute": "guest-sync-delimited", "arguments": {"id": 4711}}'


class Client:
    """A client of the plain protocol, such as socat."""

    @classmethod
    async def connect(cls, path: Path) -> Self:
        client = cls()
        client.reader, client.writer = await asyncio.open_unix_connection(path, limit=1 << 20)
        return client

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def line(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.reader.readline()

    async def ask(self, command: str, **others: Any) -> Any:
        self.send(json.dumps({"execute": command, **others}).encode())
        return json.loads(await self.line())

    async def until_in_step(self) -> list[Any]:
        """Synchronizes, and gives what comes before the answer to that."""
        self.send(SYNC)
        lines = []
        while (line := await self.line()) != b'\xff{"return": 4711}\n':
            assert line, "the connection was closed"
            lines.append(json.loads(line.replace(b"\xff", b"  ")))
        return lines

    def leave(self) -> None:
        self.writer.close()


Connect = Callable[[Path], Awaitable[Client]]
Share = Callable[..., Awaitable[Path]]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as folder:
        yield Path(folder)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    clients = []

    async def connect(path: Path) -> Client:
        clients.append(await Client.connect(path))
        return clients[-1]

    yield connect
    for client in clients:
        client.leave()
        with contextlib.suppress(ConnectionError):
            await client.writer.wait_closed()


@pytest.fixture
async def share(folder: Path) -> AsyncIterator[Share]:
    """Starts a proxy on an agent's socket, and gives its own."""
    async with contextlib.AsyncExitStack() as stack:

        async def share(agent: Path, *, timeout_s: float = TIMEOUT_S, **options: int) -> Path:
            path = folder / "shared.sock"
            listener = stack.enter_context(listening(path))
            serving = asyncio.create_task(Proxy(agent, timeout_s=timeout_s, **options).serve(listener))

            async def stop() -> None:
                serving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await serving

            stack.push_async_callback(stop)
            return path

        yield share


@pytest.fixture
async def shared(peer: Peer, share: Share) -> Path:
    return await share(peer.path)


@pytest.fixture
async def fake(folder: Path) -> AsyncIterator[FakeAgent]:
    async with FakeAgent(folder / "agent.sock") as fake:
        yield fake


WRITTEN = [
    b"",
    b'{"execute": "guest-ping"}',
    b'{"execute": "guest-ping", "id": 7}\n',
    b'{"execute": "guest-ping"}{"execute":"guest-ping","id":[1]}\r\n\r\n',
    b'{"execute": "guest-sync", "arguments": {"id": 9223372036854775807}, "id": "a\\"b"}',
    b'{"execute": "guest-sync-delimited", "arguments": {"id": -1}}',
    b"""{'execute': 'guest-ping', 'id': 'a"b\\'c'}""",
    b'{"execute": "guest-ping", "id": {"a": [1, 2.5, null, true, {}, []]}}',
    b'{"execute": "guest-ping", "id": null}',
    b'{"execute": "guest-ping", "id": 18446744073709551615}',
    b'{"execute": "guest-ping", "id": "\xc3\xa9\\u00e9\\u0001\x7f\\ud83d\\ude00\xf0\x9f\x98\x80/\\/"}',
    b'{"execute": "guest-ping", "arguments": {"x": 1}, "id": 3}',
    b'{"execute": "guest-sync", "arguments": {}, "id": 3}',
    b'{"execute": "guest-sync", "arguments": {"id": "1"}}',
    b'{"execute": "guest-nope", "id": 3}',
    b'{"execute": ""}',
    b'{"execute": "guest-get-time", "arguments": {}, "foo": 1, "id": 3}',
    b'{"execute": 1, "id": 3}',
    b'{"execute": "guest-ping", "arguments": [], "id": 3}',
    b'{"exec-oob": "guest-ping", "id": 3}',
    b'{"id": 3}',
    b"{}",
    b"[[\n]]",
    b'1 2.5e3 "x" null true\n',
    b"\xff\xff\xff",
    b'{"execute": "guest-ping", \xff',
    b'@\n{"execute": "guest-ping"}',
]
NOT_PARSED = [
    b'{"execute": "guest-pi\xff{"execute": "guest-ping"}',
    b'\x00{"execute": "guest-ping"}',
    b'HELLO {"execute": "guest-ping"}',
    b"hello world\n",
    b"}}}}\n",
    b"{]",
    b"[}",
    b'{"a": 1]}',
    b'{"a": @ } {"execute": "guest-ping", "id": 8}',
    b'{"execute": "guest-ping", "execute": "guest-ping"}',
    b'{"execute": "guest-ping", "id": nope}',
    b'{"execute": "guest-ping", "id": "\xc3("}',
    b'{"execute": "guest-ping", "id": "\t"}\n',
    b'{"execute": "guest-ping", "id": "\\q"}',
    b'{"execute": "guest-p\\u00zz"}',
    b"[%d]\n",
    b'{"a" 1}',
    b'{"a": 1,}',
    b"{1: 1}",
    b"[1 2]",
    b"[1,]",
    b", :\n",
    b"01 -x 1.\n",
    b"\xfe\n",
    b"\x7f\n",
    b'{"a": "b\n',
]
"""Here the wording of what is wrong may differ."""


async def heard(client: Client, data: bytes) -> list[Any]:
    client.send(data)
    return await client.until_in_step()


def without_wording(replies: list[Any]) -> list[Any]:
    return [str(reply["error"]["desc"])[:17] if "error" in reply else reply for reply in replies]


@pytest.mark.parametrize("data", [*WRITTEN, *NOT_PARSED])
async def test_a_client_hears_what_it_would_hear_from_the_agent(
    data: bytes, folder: Path, connect: Connect, share: Share
) -> None:
    peer = QemuGa(folder / "agent.sock")
    await peer.start()
    try:
        direct = await connect(peer.path)
        from_agent = await heard(direct, data)
        direct.leave()
        through_proxy = await heard(await connect(await share(peer.path)), data)
    finally:
        await peer.stop()
    if data in NOT_PARSED:
        from_agent, through_proxy = map(without_wording, (from_agent, through_proxy))
        assert "JSON parse error," in from_agent
    assert through_proxy == from_agent


@pytest.mark.parametrize("size", [1, 2, 3, 7])
async def test_a_request_may_come_in_pieces(shared: Path, connect: Connect, size: int) -> None:
    client = await connect(shared)
    data = b"""\xff{"execute": 'guest-sync', "arguments": {'id': -12}}1 {"execute":"guest-ping","id": "a\\"\xc3\xa9"}"""
    for at in range(0, len(data), size):
        client.send(data[at : at + size])
        await client.writer.drain()
    assert "error" in json.loads(await client.line())
    assert json.loads(await client.line()) == {"return": -12}
    assert "error" in json.loads(await client.line())
    assert json.loads(await client.line()) == {"return": {}, "id": 'a"é'}


async def test_clients_with_the_same_ids_get_each_their_own_answer(shared: Path, connect: Connect) -> None:
    clients = [await connect(shared) for _ in range(20)]
    for turn in range(5):
        answers = await asyncio.gather(
            *(
                client.ask("guest-sync", arguments={"id": 100 * turn + number}, id=1)
                for number, client in enumerate(clients)
            )
        )
        assert answers == [{"return": 100 * turn + number, "id": 1} for number in range(len(clients))]


async def test_requests_of_one_client_are_answered_in_order(shared: Path, connect: Connect) -> None:
    client = await connect(shared)
    numbers = range(50)
    client.send(b"".join(b'{"execute": "guest-sync", "arguments": {"id": %d}}' % number for number in numbers))
    assert [json.loads(await client.line())["return"] for _ in numbers] == list(numbers)


@pytest.mark.parametrize("left_behind", [b'{"execute": "guest-pi', b"[[[[[[", b'"', b'{"execute": "guest-ping"} 1'])
async def test_a_half_sent_request_harms_nobody(shared: Path, connect: Connect, left_behind: bytes) -> None:
    half, other = await connect(shared), await connect(shared)
    half.send(left_behind)
    assert await other.ask("guest-ping", id=2) == {"return": {}, "id": 2}
    half.leave()
    assert await other.ask("guest-ping", id=3) == {"return": {}, "id": 3}


async def test_errors_have_the_agents_class_and_words(start_peer: StartPeer, connect: Connect, share: Share) -> None:
    peer = await start_peer(blocked={"guest-get-timezone"})
    client = await connect(await share(peer.path))
    unknown = await client.ask("guest-make-coffee", id="x")
    assert unknown["id"] == "x"
    assert unknown["error"]["class"] == "CommandNotFound"
    assert unknown["error"]["desc"] == "The command guest-make-coffee has not been found"
    disabled = await client.ask("guest-get-timezone")
    assert disabled["error"]["class"] == "CommandNotFound"
    assert "disabled" in disabled["error"]["desc"]
    failed = await client.ask("guest-exec-status", arguments={"pid": 999_999_999})
    assert failed["error"]["class"] == "GenericError"
    assert "pid" in failed["error"]["desc"]


async def test_several_of_our_own_clients_share_one_agent(peer: Peer, shared: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(GuestAgent(shared)) for _ in range(5)]
        calls = [agents[number % 5].execute("guest-sync", {"id": number}, timeout_s=TIMEOUT_S) for number in range(100)]
        assert await asyncio.gather(*calls) == list(range(100))
        results = await asyncio.gather(
            *(run(agent, ["echo", str(number)], timeout_s=TIMEOUT_S) for number, agent in enumerate(agents))
        )
        assert [result.stdout for result in results] == [b"0\n", b"1\n", b"2\n", b"3\n", b"4\n"]
        with pytest.raises(CommandNotFound):
            await agents[0].execute("guest-make-coffee", timeout_s=TIMEOUT_S)
        with pytest.raises(CommandFailed, match="pid"):
            await agents[1].execute("guest-exec-status", {"pid": 999_999_999}, timeout_s=TIMEOUT_S)
        with pytest.raises(CommandDisabled) if isinstance(peer, QemuGa) else contextlib.nullcontext():
            await agents[2].send("guest-shutdown", timeout_s=TIMEOUT_S)


async def test_socat_hears_its_reply_though_it_sends_no_more(shared: Path) -> None:
    socat = await asyncio.create_subprocess_exec(
        *("socat", f"-t{TIMEOUT_S}", "-", f"UNIX-CONNECT:{shared}"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, _ = await socat.communicate(b'{"execute": "guest-sync", "arguments": {"id": 42}}\n')
    assert json.loads(output) == {"return": 42}


async def test_a_large_reply_arrives_whole(shared: Path, connect: Connect) -> None:
    async with GuestAgent(shared) as agent:
        result = await run(agent, ["head", "-c", "12000000", "/dev/zero"], timeout_s=TIMEOUT_S)
    assert result.stdout == bytes(12_000_000)


async def test_a_large_request_arrives_whole(shared: Path) -> None:
    data = os.urandom(3_000_000)
    async with GuestAgent(shared) as agent:
        result = await run(agent, ["cat"], input_data=data, timeout_s=TIMEOUT_S)
    assert result.stdout == data


async def test_a_client_that_leaves_cancels_its_own_call_alone(fake: FakeAgent, connect: Connect, share: Share) -> None:
    held = fake.answers["guest-get-osinfo"] = Held()
    shared = await share(fake.path)
    leaver, other = await connect(shared), await connect(shared)
    leaver.send(b'{"execute": "guest-get-osinfo", "id": 1}')
    await held.received.wait()
    pending = asyncio.create_task(other.ask("guest-sync", arguments={"id": 5}, id=1))
    leaver.leave()
    await fake.wait_for_clients(2)  # the proxy withdrew by connecting anew
    held.release.set()
    assert await pending == {"return": 5, "id": 1}


async def test_a_silent_call_ends_with_an_error_and_its_late_reply_reaches_nobody(
    fake: FakeAgent, connect: Connect, share: Share
) -> None:
    held = fake.answers["guest-get-osinfo"] = Held()
    shared = await share(fake.path, timeout_s=SHORT_S)
    client = await connect(shared)
    late = await client.ask("guest-get-osinfo", id=[1])
    assert late["id"] == [1]
    assert late["error"]["class"] == "GenericError"
    assert "outcome unknown" in late["error"]["desc"]
    held.release.set()
    async with asyncio.timeout(TIMEOUT_S):
        while "error" in (reply := await client.ask("guest-ping", id=2)):
            assert reply["id"] == 2  # while the fake still holds the old reply
    assert reply == {"return": {}, "id": 2}


@pytest.mark.parametrize("command", ["guest-shutdown", "guest-suspend-ram"])
async def test_a_command_without_success_reply_gets_none(
    fake: FakeAgent, connect: Connect, share: Share, command: str
) -> None:
    fake.answers[command] = never
    client = await connect(await share(fake.path, timeout_s=SHORT_S))
    client.send(b'{"execute": "%b", "id": 1}{"execute": "guest-nope\\udc00", "id": 2}' % command.encode())
    reply = json.loads(await client.line())
    assert reply["id"] == 2
    assert "surrogates not allowed" in reply["error"]["desc"]


async def test_without_an_agent_there_is_an_error(folder: Path, connect: Connect, share: Share) -> None:
    client = await connect(await share(folder / "nothing.sock"))
    reply = await client.ask("guest-ping", id=1)
    assert reply["id"] == 1
    assert "nothing.sock" in reply["error"]["desc"]


async def test_the_agent_may_come_back(peer: Peer, shared: Path, connect: Connect) -> None:
    client = await connect(shared)
    await client.ask("guest-ping")
    await peer.stop()
    assert "error" in await client.ask("guest-ping", id=1)
    await peer.start()
    assert await client.ask("guest-ping", id=2) == {"return": {}, "id": 2}


async def test_a_client_too_many_is_told_so(shared: Path, connect: Connect, fake: FakeAgent, folder: Path) -> None:
    with listening(folder / "small.sock") as listener:
        serving = asyncio.create_task(Proxy(fake.path, timeout_s=TIMEOUT_S, max_clients=2).serve(listener))
        first, second = await connect(folder / "small.sock"), await connect(folder / "small.sock")
        await asyncio.gather(first.ask("guest-ping"), second.ask("guest-ping"))
        third = await connect(folder / "small.sock")
        assert "2 clients" in json.loads(await third.line())["error"]["desc"]
        assert await third.line() == b""
        first.leave()
        async with asyncio.timeout(TIMEOUT_S):  # until the proxy has seen the end of the first
            while True:
                fourth = await connect(folder / "small.sock")
                with contextlib.suppress(ConnectionError):
                    if "return" in await fourth.ask("guest-ping"):
                        break
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving


async def test_a_client_that_does_not_read_delays_nobody_and_is_dropped(
    fake: FakeAgent, connect: Connect, share: Share
) -> None:
    fake.answers["guest-get-osinfo"] = value("x" * (2 << 20))
    shared = await share(fake.path, timeout_s=SHORT_S)
    other = await connect(shared)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.setblocking(False)
        deaf.connect(str(shared))
        deaf.send(b'{"execute": "guest-get-osinfo"}' * 100)
        assert await other.ask("guest-ping", id=1) == {"return": {}, "id": 1}
        await asyncio.to_thread(until_hung_up, deaf)
    assert fake.asked().count("guest-get-osinfo") < 10


def until_hung_up(sock: socket.socket) -> None:
    poll = select.poll()
    poll.register(sock, 0)
    assert poll.poll(TIMEOUT_S * 1000), "the other side still holds the connection"


@pytest.mark.parametrize(
    ("sent", "bound"),
    [
        (b'{"execute": "' + b"x" * (bounds.MAX_REQUEST_BYTES + 100), "size"),
        (b"[" * (bounds.MAX_DEPTH + 1), "depth"),
        (b"[" + b"[]," * bounds.MAX_TOKENS, "count"),
    ],
    ids=["size", "depth", "count"],
)
async def test_a_request_out_of_bounds_ends_the_connection(
    shared: Path, connect: Connect, sent: bytes, bound: str
) -> None:
    client, other = await connect(shared), await connect(shared)
    client.send(sent)
    assert bound in json.loads(await client.line())["error"]["desc"]
    with contextlib.suppress(ConnectionError):
        assert await client.line() == b""
    assert await other.ask("guest-ping", id=1) == {"return": {}, "id": 1}


def test_the_socket_is_this_users_alone(folder: Path) -> None:
    path = folder / "shared.sock"
    umask = os.umask(0)
    try:
        with listening(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(umask)
    assert list(folder.iterdir()) == []


def test_a_socket_in_use_is_left_alone(folder: Path) -> None:
    path = folder / "shared.sock"
    with listening(path), pytest.raises(OSError, match="another process serves it"), listening(path):
        pass
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen(0)
        for _ in range(3):  # also with a full queue
            with pytest.raises(OSError, match="another process serves it"), listening(path):
                pass
        assert path.is_socket()


def test_what_is_no_socket_is_left_alone(folder: Path) -> None:
    path = folder / "shared.sock"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="something else"), listening(path):
        pass
    assert path.read_text() == "mine"


def test_a_socket_that_nobody_serves_is_replaced(folder: Path) -> None:
    path = folder / "shared.sock"
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(str(path))
    with listening(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_that_was_replaced_is_not_removed(folder: Path) -> None:
    path = folder / "shared.sock"
    with listening(path), socket.socket(socket.AF_UNIX) as foreign:
        path.unlink()
        foreign.bind(str(path))
    assert path.is_socket()
