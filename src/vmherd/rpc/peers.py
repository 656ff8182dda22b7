"""The front of a socket: lets through to a gRPC server who the kernel says is one of its users.

gRPC for Python tells nobody which user is behind a unix socket. So the front accepts, asks the kernel, and passes on
what both sides say, to and from the socket that gRPC has in a directory of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import cast

import structlog

GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""How every HTTP/2 client begins: RFC 9113, section 3.4."""

GREETING_TIMEOUT_S = 10.0
SILENT_MAX = 128
"""Of each user: connections without a greeting. One more, and the oldest has to go."""

CONNECTIONS_MAX = 32
"""Of each user: connections with a greeting. A controller has one."""

END_TIMEOUT_S = 0.5
QUEUE_MAX = 1024
"""How many may wait to be accepted; for who comes without waiting, a full queue is a refusal."""

ACCEPTED_AT_ONCE_MAX = 16
"""Far below `SILENT_MAX`: who has just been accepted is read from before it has to make room."""

_CREDENTIALS = struct.Struct("=iII")
"""`struct ucred` of unix(7): pid, uid, gid."""

_log = structlog.get_logger()


@contextlib.asynccontextmanager
async def front(listen: Path, server: Path, users: Collection[int]) -> AsyncIterator[None]:
    """Listens on one unix socket and lets these users (uids) through to the server on another.

    When the context is left the server has ended: what it said last is passed on, and the connections are closed.
    """
    callers = _Callers(server, frozenset(users))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(listen))
        accepting = await asyncio.get_running_loop().create_unix_server(
            lambda: _Caller(callers), sock=listener, backlog=ACCEPTED_AT_ONCE_MAX
        )
        listener.listen(QUEUE_MAX)  # asyncio has one number for the queue and for how many it accepts at once
        try:
            yield
        finally:
            accepting.close()
            await callers.close()


class _Callers:
    """Everybody who is connected, the oldest first."""

    def __init__(self, server: Path, users: frozenset[int]) -> None:
        self.server = server
        self._users = users
        self._connected: dict[_Caller, None] = {}
        self._ending = False
        self._nobody = asyncio.Event()
        self._nobody.set()

    def add(self, caller: _Caller) -> None:
        """Takes a caller in, or refuses it."""
        if caller.uid not in self._users:
            caller.refuse("this user may not call")
        elif self._ending:
            caller.refuse("the server is shutting down")
        else:
            silent = self._of(caller.uid, greeted=False)
            if len(silent) >= SILENT_MAX:
                silent[0].refuse(f"{SILENT_MAX} others of this user have said nothing either")
            self._connected[caller] = None
            self._nobody.clear()

    def remove(self, caller: _Caller) -> None:
        """Forgets a caller."""
        self._connected.pop(caller, None)
        if not self._connected:
            self._nobody.set()

    def room_for(self, uid: int) -> bool:
        """Whether one more of this user's callers may go on to the server."""
        return len(self._of(uid, greeted=True)) < CONNECTIONS_MAX

    async def close(self) -> None:
        """Waits for a moment until the callers have what the server said last, and lets go of all."""
        self._ending = True
        for caller in [caller for caller in self._connected if not caller.greeted]:
            caller.transport.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._nobody.wait()
        for caller in self._connected:
            caller.transport.abort()

    def _of(self, uid: int, *, greeted: bool) -> list[_Caller]:
        return [caller for caller in self._connected if caller.uid == uid and caller.greeted is greeted]


class _End(asyncio.Protocol):
    """One end of a connection: what comes in here goes out at the other end, as fast as that one takes it."""

    transport: asyncio.Transport
    other: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other:
            self.other.write(data)

    def pause_writing(self) -> None:
        if self.other:
            self.other.pause_reading()

    def resume_writing(self) -> None:
        if self.other:
            self.other.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other:
            self.other.close()


class _Server(_End):
    """The end towards the server. It says no more when it closes, so its end is the connection's."""

    def __init__(self, caller: asyncio.Transport) -> None:
        self.other = caller


class _Caller(_End):
    """The end towards a caller. It reaches the server once it has said that it speaks HTTP/2."""

    pid: int
    uid: int

    def __init__(self, callers: _Callers) -> None:
        self._callers = callers
        self._said = b""
        self._connecting: asyncio.Task[None] | None = None

    @property
    def greeted(self) -> bool:
        """Whether it has said that it speaks HTTP/2."""
        return self._connecting is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connection: socket.socket = transport.get_extra_info("socket")
        # The user who has connected, whoever holds the socket by now.
        self.pid, self.uid, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        self._deadline = asyncio.get_running_loop().call_later(
            GREETING_TIMEOUT_S, self.refuse, f"it has not said that it speaks HTTP/2 for {GREETING_TIMEOUT_S:g} s"
        )
        self._callers.add(self)

    def refuse(self, why: str) -> None:
        """Ends the connection without a word to the caller; the log has the reason."""
        _log.warning("caller refused", peer_uid=self.uid, peer_pid=self.pid, why=why)
        self._callers.remove(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.greeted:
            super().data_received(data)
            return
        self._said += data
        if not self._said.startswith(GREETING[: len(self._said)]):
            self.refuse(f"it does not speak HTTP/2: {self._said[: len(GREETING)]!r}")
        elif len(self._said) >= len(GREETING):
            self._go_on()

    def _go_on(self) -> None:
        if not self._callers.room_for(self.uid):
            self.refuse(f"this user has {CONNECTIONS_MAX} connections")
            return
        self._deadline.cancel()
        self.transport.pause_reading()
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            server, _ = await loop.create_unix_connection(lambda: _Server(self.transport), str(self._callers.server))
        except OSError as error:
            self.refuse(f"the server does not answer: {error.strerror}")
            return
        self.other = server
        if self.transport.is_closing():
            server.close()
            return
        server.write(self._said)
        self.transport.resume_reading()

    def eof_received(self) -> bool:
        """Passes on that the caller says no more; it may still listen."""
        if self.other:
            self.other.write_eof()
        return self.other is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._callers.remove(self)
        super().connection_lost(exc)
