"""The one owner of an agent's socket: many callers, one command at a time.

The agent hears one client at a time and answers in order, so calls wait for their turn in the order in which they came.
A connection is used only while both sides are known to be in step. Whatever else happens to a call (deadline, cancel,
end of file, nonsense), its connection is closed at once, and the next call connects and synchronizes again. Closing
withdraws a request that the guest has not read yet; a reply that comes later all the same is void, since it comes
before the answer to the new synchronization.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from vmherd.guest_agent.errors import (
    AgentError,
    AgentNotConfigured,
    AgentNotConnected,
    AgentNotRunning,
    AgentUnresponsive,
    ProtocolError,
)
from vmherd.guest_agent.wire import (
    Failure,
    LineDecoder,
    MalformedReply,
    Reply,
    encode_request,
    encode_sync,
    is_sync_reply,
    parse_reply,
)

E = TypeVar("E", bound=AgentError)

_READ_BYTES = 128 << 10
_FULL_QUEUE_PAUSE_S = 0.02


class _Stage(Enum):
    """How far a call has come, in the words for a caller whose deadline passes there."""

    QUEUED = "earlier calls were not finished"
    CONNECTING = "too many clients wait at the socket"
    SYNCING = "nothing answers: no agent runs in the guest, or it hangs, or another client holds the socket"
    SENT = "the agent did not reply"
    ANSWERED = "the reply came"


@dataclass
class _Call:
    command: str
    id: int
    started: float
    stage: _Stage = _Stage.QUEUED

    def error(self, kind: type[E], message: str) -> E:
        return kind(
            f"{self.command}: {message}",
            command=self.command,
            elapsed_s=asyncio.get_running_loop().time() - self.started,
            outcome_unknown=self.stage is _Stage.SENT,
        )


class _Connection:
    """One connection to the socket, from the first byte to the last."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: LineDecoder) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._lines: deque[bytes] = deque()
        self.in_step = False

    @classmethod
    async def open(cls, path: str, max_reply_bytes: int) -> _Connection:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            # A unix socket connects at once or not at all. asyncio takes the EAGAIN of a full backlog for "in
            # progress" and then for success: https://man7.org/linux/man-pages/man2/connect.2.html
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, LineDecoder(max_reply_bytes))

    @property
    def ended(self) -> bool:
        return self._reader.at_eof() or self._reader.exception() is not None

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def read_line(self) -> bytes:
        while not self._lines:
            data = await self._reader.read(_READ_BYTES)
            if not data:
                raise EOFError("the connection was closed")
            self._lines.extend(self._decoder.feed(data))
        return self._lines.popleft()

    def abort(self) -> None:
        # A plain close would first send what is still to be written.
        self._writer.transport.abort()

    async def wait_closed(self) -> None:
        await self._writer.wait_closed()


class Channel:
    """Calls an agent through the socket at `path`, for as many callers as there are."""

    def __init__(self, path: str, *, max_reply_bytes: int) -> None:
        self._path = path
        self._max_reply_bytes = max_reply_bytes
        self._connection: _Connection | None = None
        self._turn = asyncio.Lock()  # first come, first served
        self._port_open: bool | None = None
        self._closed = False
        # A random start keeps the late reply to an earlier client from being taken for ours.
        self._ids = itertools.count(secrets.randbits(62))

    async def call(self, command: str, arguments: Mapping[str, object] | None, *, timeout_s: float) -> Reply:
        """Send a command and give the agent's reply; the deadline covers the whole way.

        Raises AgentUnavailable and its kinds, ProtocolError, and what `encode_request` raises.
        """
        call = _Call(command, next(self._ids), started=asyncio.get_running_loop().time())
        request = encode_request(command, arguments, call.id)
        try:
            if timeout_s <= 0:
                # asyncio.timeout() would let the request out before it looks at the clock.
                raise TimeoutError
            async with asyncio.timeout(timeout_s), self._turn:
                return await self._exchange(call, request)
        except TimeoutError as error:
            raise call.error(AgentUnresponsive, f"{timeout_s:.3g} s were not enough: {call.stage.value}") from error

    def set_port_open(self, port_open: bool | None) -> None:
        """Take note of whether the guest holds its end open; if not, calls fail now and not at their deadline."""
        self._port_open = port_open
        if port_open is False:
            self._drop()

    async def close(self) -> None:
        """Close the connection; calls on their way, and later ones, raise AgentNotConnected."""
        self._closed = True
        connection = self._connection
        self._drop()
        if connection is not None:
            await connection.wait_closed()

    async def _exchange(self, call: _Call, request: bytes) -> Reply:
        try:
            connection = await self._connect(call)
            call.stage = _Stage.SENT
            await connection.write(request)
            while True:
                reply = parse_reply(await connection.read_line())
                if reply.id == call.id:
                    call.stage = _Stage.ANSWERED
                    return reply
                if reply.id is None:
                    return _unparsed(reply)
                # Any other id belongs to a call that gave up.
        except (OSError, EOFError) as error:
            raise self._lost(call, error) from error
        except MalformedReply as error:
            raise call.error(ProtocolError, f"not a guest agent's reply: {error}") from error
        finally:
            if call.stage is not _Stage.ANSWERED:
                self._drop()

    async def _connect(self, call: _Call) -> _Connection:
        """Give a connection on which the next line from the agent answers what is sent now."""
        call.stage = _Stage.CONNECTING
        if self._connection is not None and self._connection.ended:
            self._drop()
        while self._connection is None:
            self._check_open()
            try:
                self._connection = await _Connection.open(self._path, self._max_reply_bytes)
            except BlockingIOError:
                # Our own connections that we gave up count as well, until the other side takes note of their end.
                await asyncio.sleep(_FULL_QUEUE_PAUSE_S)
        self._check_open()
        connection = self._connection
        if not connection.in_step:
            call.stage = _Stage.SYNCING
            token = next(self._ids)
            await connection.write(encode_sync(token))
            while not is_sync_reply(await connection.read_line(), token):
                pass
            connection.in_step = True
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise EOFError("this client was closed")
        if self._port_open is False:
            raise EOFError

    def _lost(self, call: _Call, error: Exception) -> AgentError:
        if self._port_open is False:
            return call.error(AgentNotRunning, "no agent in the guest holds its end of the channel open")
        if isinstance(error, FileNotFoundError):
            return call.error(AgentNotConfigured, f"there is no socket at {self._path}")
        return call.error(AgentNotConnected, f"{self._path}: {error}")

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


def _unparsed(reply: Reply) -> Failure:
    """Take a reply without an id for the answer to the only request that the agent had to parse."""
    if isinstance(reply, Failure):
        return reply
    raise MalformedReply("a success without an id")
