"""The one owner of an agent's socket: many callers, one command at a time.

The agent hears one client at a time and answers in order, so calls wait for their turn in the order in which they came;
urgent ones wait for the call that is under way alone.
A connection is used only while both sides are known to be in step. Whatever else happens to a call (deadline, cancel,
end of file, nonsense), its connection is closed at once, and the next call connects and synchronizes again. Closing
withdraws a request that the guest has not read yet; a reply that comes later all the same is void, since it comes
before the answer to the new synchronization.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar, cast

from vmherd.guest_agent.address import Address, TcpAddress, UnixAddress, address_of
from vmherd.guest_agent.errors import (
    AgentError,
    AgentNotConfigured,
    AgentNotConnected,
    AgentNotRunning,
    AgentUnresponsive,
    ProtocolError,
)
from vmherd.guest_agent.reading import ReplyReader, SyncReader
from vmherd.guest_agent.wire import (
    MAX_PLAIN_BYTES,
    Failure,
    MalformedReply,
    Reply,
    encode_request,
    encode_sync,
    max_reply_bytes,
)

E = TypeVar("E", bound=AgentError)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

is_urgent: ContextVar[bool] = ContextVar("is_urgent", default=False)
"""Set for what a caller still has to do before it can leave, such as to end its program."""

_READ_BYTES = 128 << 10
_FULL_QUEUE_PAUSE_S = 0.02


class _Stage(Enum):
    """How far a call has come, in the words for a caller whose deadline passes there."""

    QUEUED = "earlier calls were not finished"
    CONNECTING = "nothing takes the connection, or too many clients wait for theirs"
    SYNCING = "nothing answers: no agent runs in the guest, or it hangs, or another client holds the socket"
    SENT = "the agent did not reply"
    ANSWERED = "the reply came"


@dataclass(slots=True)
class _Call:
    command: str
    started_s: float
    stage: _Stage = _Stage.QUEUED

    def error(self, kind: type[E], message: str) -> E:
        return kind(
            f"{self.command}: {message}",
            command=self.command,
            elapsed_s=asyncio.get_running_loop().time() - self.started_s,
            outcome_unknown=self.stage is _Stage.SENT,
        )


class _PortClosed(Exception):
    """The guest does not hold its end of the channel open; the text says why."""


class _Late(Exception):
    """The deadline passed."""


@contextlib.asynccontextmanager
async def _until(deadline_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline_s) as timeout:
            yield
    except TimeoutError as error:
        if timeout.expired():
            raise _Late from error
        raise  # the operating system's, for a host that does not answer


class _Reader(Protocol[T_co]):
    """Finds what is waited for in the bytes that come; `has_rest` tells that more came with it."""

    has_rest: bool

    def feed(self, data: bytes) -> T_co | None: ...


class _Connection(asyncio.BufferedProtocol):
    """One connection to the socket, from the first byte to the last.

    It is in step while the next byte from the agent belongs to the answer to what is sent next.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._transport: asyncio.Transport
        self._reader: _Reader[Any]
        self._found: asyncio.Future[Any] | None = None
        self._deadline_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.lost: Exception | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.in_step = False

    @classmethod
    async def open(cls, address: Address) -> _Connection:
        loop = asyncio.get_running_loop()
        match address:
            case TcpAddress(host, port):  # asyncio sets TCP_NODELAY
                return (await loop.create_connection(cls, host, port))[1]
            case UnixAddress(path):
                sock = socket.socket(socket.AF_UNIX)
                try:
                    sock.setblocking(False)
                    # A unix socket connects at once or not at all. asyncio takes the EAGAIN of a full backlog for "in
                    # progress" and then for success: https://man7.org/linux/man-pages/man2/connect.2.html
                    sock.connect(path)
                except OSError:
                    sock.close()
                    raise
                return (await loop.create_unix_connection(cls, sock=sock))[1]

    async def exchange(self, data: bytes, reader: _Reader[T], deadline_s: float) -> T:
        """Send this and give what the reader finds in what comes back.

        Raises _Late, what the connection is lost by, and what the reader raises. It must not be lost already.
        """
        self._reader = reader
        self._found = self._loop.create_future()
        self._deadline_s = deadline_s
        if self._timer is None or self._timer.when() > deadline_s:
            self._set_timer()
        self._transport.write(data)
        try:
            result: T = await self._found
        finally:
            self._found = None
        return result

    def abort(self, reason: Exception) -> None:
        # A plain close would first send what is still to be written.
        self._transport.abort()
        self._lose(reason)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, _: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, size_bytes: int) -> None:
        if self._found is None or self._found.done():
            self.abort(EOFError("the agent sent what nobody asked for"))
            return
        try:
            result = self._reader.feed(bytes(self._buffer[:size_bytes]))
        except MalformedReply as error:
            self._found.set_exception(error)
            return
        if result is not None:
            self.in_step = not self._reader.has_rest
            self._found.set_result(result)

    def connection_lost(self, reason: Exception | None) -> None:
        self._lose(reason or EOFError("the connection was closed"))
        self.closed.set_result(None)

    def _lose(self, reason: Exception) -> None:
        self.lost = self.lost or reason
        self._fail(self.lost)
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        """Wake up at the deadline. One timer outlasts many calls, for setting one costs as much as parsing a reply."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._deadline_s, self._look_at_the_clock)

    def _look_at_the_clock(self) -> None:
        self._timer = None
        if self._found is None:
            return
        if self._loop.time() < self._deadline_s:
            self._set_timer()
        else:
            self._fail(_Late())

    def _fail(self, reason: Exception) -> None:
        if self._found is not None and not self._found.done():
            self._found.set_exception(reason)


class Channel:
    """Calls an agent at an address, for as many callers as there are."""

    def __init__(self, address: str | os.PathLike[str] | Address) -> None:
        self._address = address_of(address)
        self._connection: _Connection | None = None
        # Both are first come, first served. Calls line up for their turn one after the other, urgent ones beside them.
        self._line = asyncio.Lock()
        self._turn = asyncio.Lock()
        self._why_closed = ""
        self._closed = False
        self._session = 0
        self._callers = 0
        # A random start keeps the late reply to an earlier client from being taken for ours.
        self._ids = itertools.count(secrets.randbits(62))

    @property
    def session(self) -> int:
        """A number that changes when a connection ends and when the guest's end opens or closes.

        While it stays the same, the same agent answers.
        """
        return self._session

    async def call(self, command: str, arguments: Mapping[str, object] | None, *, timeout_s: float) -> Reply:
        """Send a command and give the agent's reply; the deadline covers the whole way.

        Raises AgentUnavailable and its kinds, ProtocolError, and what `encode_request` and `max_reply_bytes` raise.
        """
        request_id = next(self._ids)
        request = encode_request(command, arguments, request_id)
        return await self._in_turn(command, request, (request_id,), max_reply_bytes(command, arguments), timeout_s)

    async def send(self, command: str, arguments: Mapping[str, object] | None, *, timeout_s: float) -> Failure | None:
        """Send a command that the agent answers only if it fails; give the failure, or None once the agent took it.

        A ping goes out behind the command: its answer with nothing before it means that the command did not fail.
        Raises what `call` raises; with `outcome_unknown` the agent may have carried out the command and be gone.
        """
        request_id, ping_id = next(self._ids), next(self._ids)
        requests = encode_request(command, arguments, request_id) + encode_request("guest-ping", None, ping_id)
        reply = await self._in_turn(command, requests, (request_id, ping_id), MAX_PLAIN_BYTES, timeout_s)
        return reply if isinstance(reply, Failure) and reply.id != ping_id else None

    def set_port_open(self, port_open: bool | None, why: str = "") -> None:
        """Take note of whether the guest holds its end open; if not, calls fail now and not at their deadline.

        `why` is for their callers: it says what closed it.
        """
        self._session += 1
        self._why_closed = ""
        if port_open is False:
            self._why_closed = why or "no agent in the guest holds its end of the channel open"
            self._drop(_PortClosed(self._why_closed))

    async def close(self) -> None:
        """Close the connection; calls on their way, and later ones, raise AgentNotConnected."""
        self._closed = True
        connection = self._connection
        self._drop(EOFError("this client was closed"))
        if connection is not None:
            await connection.closed

    async def _in_turn(
        self, command: str, request: bytes, ids: Sequence[int], max_bytes: int, timeout_s: float
    ) -> Reply:
        """Send a request, or several, and give the first reply once the last has its own."""
        call = _Call(command, started_s=asyncio.get_running_loop().time())
        reader = ReplyReader(ids, max_bytes)
        deadline_s = call.started_s + timeout_s
        self._callers += 1
        try:
            if timeout_s <= 0:
                raise _Late  # before anything is sent
            async with contextlib.AsyncExitStack() as held:
                for lock in (self._turn,) if is_urgent.get() else (self._line, self._turn):
                    if self._callers == 1:
                        await held.enter_async_context(lock)  # nobody has it
                    else:
                        async with _until(deadline_s):
                            await held.enter_async_context(lock)
                return await self._exchange(call, request, reader, deadline_s)
        except _Late as error:
            raise call.error(AgentUnresponsive, f"{timeout_s:.3g} s were not enough: {call.stage.value}") from error
        finally:
            self._callers -= 1

    async def _exchange(self, call: _Call, request: bytes, reader: ReplyReader, deadline_s: float) -> Reply:
        try:
            connection = self._connection
            if connection is None or connection.lost or not connection.in_step:
                connection = await self._connect(call, deadline_s)
            call.stage = _Stage.SENT
            reply: Reply = await connection.exchange(request, reader, deadline_s)
            call.stage = _Stage.ANSWERED
            return reply
        except (OSError, EOFError, _PortClosed) as error:
            raise self._lost(call, error) from error
        except MalformedReply as error:
            raise call.error(ProtocolError, f"not a guest agent's reply: {error}") from error
        finally:
            if call.stage is not _Stage.ANSWERED:
                self._drop(EOFError("a call was given up"))

    async def _connect(self, call: _Call, deadline_s: float) -> _Connection:
        """Give a connection on which the next line from the agent answers what is sent now."""
        call.stage = _Stage.CONNECTING
        if self._connection is not None and self._connection.lost:
            self._drop(self._connection.lost)
        while self._connection is None:
            self._check_open()
            try:
                async with _until(deadline_s):
                    self._connection = await _Connection.open(self._address)
            except BlockingIOError:
                # Our own connections that we gave up count as well, until the other side takes note of their end.
                async with _until(deadline_s):
                    await asyncio.sleep(_FULL_QUEUE_PAUSE_S)
        self._check_open()
        connection = self._connection
        while not connection.in_step:
            call.stage = _Stage.SYNCING
            token = next(self._ids)
            await connection.exchange(encode_sync(token), SyncReader(token), deadline_s)
            if connection.lost:
                raise connection.lost
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise EOFError("this client was closed")
        if self._why_closed:
            raise _PortClosed(self._why_closed)

    def _lost(self, call: _Call, error: Exception) -> AgentError:
        if isinstance(error, _PortClosed):
            return call.error(AgentNotRunning, str(error))
        if isinstance(error, FileNotFoundError):
            return call.error(AgentNotConfigured, f"there is no socket at {self._address}")
        return call.error(AgentNotConnected, f"{self._address}: {error}")

    def _drop(self, reason: Exception) -> None:
        if self._connection is not None:
            self._connection.abort(reason)
            self._connection = None
            self._session += 1
