"""Who gets through the front of a socket, what is passed on, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from vmherd.rpc import peers
from vmherd.rpc.peers import GREETING, front

pytestmark = pytest.mark.anyio

DEADLINE_S = 20.0
OTHER_UID = 1_955_555_555
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@dataclass
class Line:
    """One end of a connection."""

    socket: socket.socket

    async def say(self, words: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, words)

    def say_no_more(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    async def hear(self, size: int) -> bytes:
        heard = b""
        while len(heard) < size:
            heard += (more := await asyncio.get_running_loop().sock_recv(self.socket, size - len(heard)))
            assert more, f"the connection ended after {heard!r}"
        return heard

    async def hear_out(self) -> bytes:
        """What comes before the end, which may be a reset."""
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while more := await asyncio.get_running_loop().sock_recv(self.socket, 1 << 20):
                heard += more
        return heard


class Place:
    """A directory with the front's socket and, behind it, a server that the test plays."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory = directory
        self.front = directory / "front"
        self.server = directory / "server"
        self._stack = stack
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.setblocking(False)
        self._listener.bind(str(self.server))
        self._listener.listen()

    async def caller(self, words: bytes = b"") -> Line:
        caller = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        caller.setblocking(False)
        await asyncio.get_running_loop().sock_connect(caller, str(self.front))
        line = Line(caller)
        await line.say(words)
        return line

    async def accepted(self) -> Line:
        """The server's end of the next connection that comes through, after its greeting."""
        accepted, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        line = Line(self._stack.enter_context(accepted))
        assert await line.hear(len(GREETING)) == GREETING
        return line

    def hang_up(self) -> None:
        """Ends all connections from this side."""
        self._stack.close()

    def nobody_came(self) -> bool:
        """Whether no connection waits to be accepted."""
        try:
            self._listener.accept()[0].close()
        except BlockingIOError:
            return True
        return False


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as directory, contextlib.ExitStack() as stack:
        async with asyncio.timeout(DEADLINE_S):
            yield Place(Path(directory), stack)


@pytest.fixture
async def opened(place: Place) -> AsyncIterator[Place]:
    async with front(place.front, place.server, {os.geteuid()}):
        yield place
        place.hang_up()


@pytest.fixture
def logs() -> Iterator[list[EventDict]]:
    with capture_logs() as logs:
        yield logs


def reasons(logs: list[EventDict]) -> list[str]:
    assert {(log["event"], log["log_level"], log["peer_uid"]) for log in logs} <= {
        ("caller refused", "warning", os.geteuid())
    }
    return [log["why"] for log in logs]


async def test_both_sides_hear_each_other(opened: Place, logs: list[EventDict]) -> None:
    caller = await opened.caller()
    for byte in GREETING:  # however it is cut
        await caller.say(bytes([byte]))
    server = await opened.accepted()
    for number in range(100):
        await caller.say(b"ping %02d" % number)
        assert await server.hear(7) == b"ping %02d" % number
        await server.say(b"pong %02d" % number)
        assert await caller.hear(7) == b"pong %02d" % number
    caller.socket.close()
    assert await server.hear_out() == b""
    assert logs == []


async def test_what_is_said_with_the_greeting_is_passed_on(opened: Place) -> None:
    await opened.caller(GREETING + b"and more")
    server = await opened.accepted()
    assert await server.hear(8) == b"and more"


async def test_who_says_no_more_still_gets_an_answer(opened: Place) -> None:
    caller = await opened.caller(GREETING + b"the last words")
    caller.say_no_more()
    server = await opened.accepted()
    assert await server.hear_out() == b"the last words"
    await server.say(b"the answer")
    server.socket.close()
    assert await caller.hear_out() == b"the answer"


async def test_the_servers_end_is_the_connections(opened: Place) -> None:
    caller = await opened.caller(GREETING)
    server = await opened.accepted()
    await server.say(b"bye")
    server.socket.close()
    assert await caller.hear_out() == b"bye"
    with pytest.raises(BrokenPipeError):
        await caller.say(b"is anyone there?")


async def test_what_the_server_does_not_take_is_not_kept(opened: Place) -> None:
    """Of 64 MiB that nobody reads the front takes a little, and all of it arrives once somebody does."""
    chunk, size = 1 << 16, 64 << 20
    caller = await opened.caller(GREETING)
    server = await opened.accepted()
    taken = 0
    with contextlib.suppress(TimeoutError):
        while taken < size:
            async with asyncio.timeout(0.3):
                await asyncio.get_running_loop().sock_sendall(caller.socket, bytes(chunk))
            taken += chunk
    assert taken < 4 << 20
    caller.say_no_more()
    assert taken <= len(await server.hear_out()) < taken + chunk


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b"\0", b"PRI * HTTP/2.1", GREETING[:-1] + b"\r", b"x" * 1000]
)
async def test_who_does_not_speak_http_2_is_refused(opened: Place, logs: list[EventDict], words: bytes) -> None:
    caller = await opened.caller(words)
    assert await caller.hear_out() == b""
    assert reasons(logs) == [f"it does not speak HTTP/2: {words[:24]!r}"]
    assert opened.nobody_came()


@pytest.mark.parametrize("words", [b"", GREETING[:-1]])
async def test_who_does_not_finish_the_greeting_is_dropped(
    opened: Place, logs: list[EventDict], monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    monkeypatch.setattr(peers, "GREETING_TIMEOUT_S", 0.05)
    caller = await opened.caller()
    await caller.say(words)
    assert await caller.hear_out() == b""
    assert reasons(logs) == ["it has not said that it speaks HTTP/2 for 0.05 s"]
    assert opened.nobody_came()


async def test_who_has_greeted_may_be_quiet(
    opened: Place, logs: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = await opened.caller(GREETING)
    server = await opened.accepted()
    monkeypatch.setattr(peers, "GREETING_TIMEOUT_S", 0.05)
    another = await opened.caller()
    assert await another.hear_out() == b""
    await quiet.say(b"still here")
    assert await server.hear(10) == b"still here"
    assert len(logs) == 1


async def test_the_silent_make_room(opened: Place, logs: list[EventDict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SILENT_MAX", 3)
    quiet = await opened.caller(GREETING)
    server = await opened.accepted()
    silent = [await opened.caller() for _ in range(4)]
    assert await silent[0].hear_out() == b""
    for caller in silent[1:]:
        await caller.say(GREETING)
        await opened.accepted()
    await quiet.say(b"still here")
    assert await server.hear(10) == b"still here"
    assert reasons(logs) == ["3 others of this user have said nothing either"]


async def test_a_users_connections_are_counted(
    opened: Place, logs: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "CONNECTIONS_MAX", 2)
    await opened.caller(GREETING)
    await opened.accepted()
    second = await opened.caller(GREETING)
    server = await opened.accepted()
    third = await opened.caller(GREETING)
    assert await third.hear_out() == b""
    assert reasons(logs) == ["this user has 2 connections"]
    server.socket.close()
    assert await second.hear_out() == b""  # so it is not counted any more
    await opened.caller(GREETING)
    await opened.accepted()


async def test_a_server_that_is_gone_is_told_of(place: Place, logs: list[EventDict]) -> None:
    async with front(place.front, place.directory / "nobody", {os.geteuid()}):
        caller = await place.caller(GREETING)
        assert await caller.hear_out() == b""
    assert reasons(logs) == ["the server does not answer: No such file or directory"]


async def test_at_the_end_the_servers_last_words_arrive_and_nobody_stays(place: Place) -> None:
    async with front(place.front, place.server, {os.geteuid()}):
        caller = await place.caller(GREETING)
        server = await place.accepted()
        silent = await place.caller()
        staying = await place.caller(GREETING)
        await place.accepted()
        await server.say(b"x" * 100_000)
        server.socket.close()
    assert await caller.hear_out() == b"x" * 100_000
    assert await silent.hear_out() == b""
    assert await staying.hear_out() == b""
    with pytest.raises(ConnectionRefusedError):
        await place.caller()


@needs_root
async def test_the_kernels_word_counts(place: Place, logs: list[EventDict]) -> None:
    """A user who is not one of the peers is refused, even where the socket's mode would let it in."""
    place.directory.chmod(0o755)
    connecting = (
        "import os, socket, sys; uid = int(sys.argv[3]); os.setresuid(uid, uid, uid);"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "s.sendall(bytes.fromhex(sys.argv[2])); print(s.recv(1))"
    )
    command = [sys.executable, "-I", "-S", "-c", connecting, str(place.front), GREETING.hex()]
    async with front(place.front, place.server, {OTHER_UID}):
        place.front.chmod(0o666)
        for uid in (OTHER_UID + 1, os.geteuid()):  # nobody is let in for being root
            stranger = await asyncio.create_subprocess_exec(*command, str(uid), stderr=subprocess.PIPE)
            await stranger.communicate()
        assert [(log["event"], log["peer_uid"], log["why"]) for log in logs] == [
            ("caller refused", uid, "this user may not call") for uid in (OTHER_UID + 1, os.geteuid())
        ]
        assert place.nobody_came()
        friend = await asyncio.create_subprocess_exec(*command, str(OTHER_UID), stdout=subprocess.PIPE)
        server = await place.accepted()
        await server.say(b"!")
        assert await friend.communicate() == (b"b'!'\n", None)
