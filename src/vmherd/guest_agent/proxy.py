"""Lets several clients of the plain wire protocol share one agent.

An agent hears one client at a time and does not know whose late reply is whose. The proxy is that one client. Each of
its own clients has a stream to itself: its requests are carried out one after the other, those of several clients in
turn. Replies are the agent's, with the client's own `id`. What the agent does not answer, the proxy answers with an
error: what is no request, a deadline that passed, an agent that is not there.

::

    with listening(Path("/run/vm/shared.sock")) as listener:
        await Proxy("/run/vm/agent.sock", timeout_s=60).serve(listener)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import stat
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from vmherd.guest_agent.address import Address, address_of
from vmherd.guest_agent.channel import Channel
from vmherd.guest_agent.errors import AgentError
from vmherd.guest_agent.requests import Refusal, Request, RequestDecoder, RequestOutOfBounds
from vmherd.guest_agent.wire import DELIMITER, Failure, Reply

MAX_CLIENTS = 32

SILENT_COMMANDS = frozenset({"guest-shutdown", "guest-suspend-disk", "guest-suspend-ram", "guest-suspend-hybrid"})
"""The agent answers these only if they fail."""
SILENCE_S = 5.0
"""How long an agent may take to go on after one of these; one that suspends the guest does not. Others wait for it."""

_READ_BYTES = 64 << 10
_BACKLOG = 64


class Proxy:
    """Carries out what clients ask for on the agent at an address, which is what `GuestAgent` takes.

    `timeout_s` bounds the time from a request to its reply, and the time that a client may take to read the reply. A
    client costs the memory of one request and one reply, however much it sends and however little it reads.
    """

    def __init__(
        self, address: str | os.PathLike[str] | Address, *, timeout_s: float, max_clients: int = MAX_CLIENTS
    ) -> None:
        self._channel = Channel(address_of(address))
        self._timeout_s = timeout_s
        self._max_clients = max_clients

    async def serve(self, listener: socket.socket) -> NoReturn:
        """Serve the clients that come to a listening socket until cancelled, which cancels their calls as well."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        clients: set[asyncio.Task[None]] = set()
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    sock, _ = await loop.sock_accept(listener)
                    if len(clients) < self._max_clients:
                        task = tasks.create_task(self._serve(sock))
                        clients.add(task)
                        task.add_done_callback(clients.discard)
                    else:
                        self._turn_away(sock)
        finally:
            await self._channel.close()

    async def _serve(self, sock: socket.socket) -> None:
        decoder = RequestDecoder()
        # A client that left, or that does not read, gets nothing more.
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with _Client(sock) as client:
                try:
                    async for piece in client.pieces():
                        for request in decoder.feed(piece):
                            reply = await client.while_it_stays(self._reply(request))
                            await client.send(reply, timeout_s=self._timeout_s)
                except RequestOutOfBounds as error:
                    await client.send(_error_line(str(error)), timeout_s=self._timeout_s)

    def _turn_away(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(ConnectionError):
            sock.setblocking(False)
            sock.send(_error_line(f"{self._max_clients} clients share this agent already; end one of them first"))

    async def _reply(self, request: Request | Refusal) -> bytes:
        if isinstance(request, Refusal):
            return _error_line(request.desc, request.echo)
        try:
            reply = await self._call(request)
        except AgentError as error:
            is_silence = error.outcome_unknown and request.command in SILENT_COMMANDS
            return b"" if is_silence else _error_line(str(error), request.echo)
        except ValueError as error:  # for instance half a character, which JSON can spell and UTF-8 cannot
            return _error_line(str(error), request.echo)
        return b"" if reply is None else _reply_line(reply, request)

    async def _call(self, request: Request) -> Reply | None:
        """Give the agent's reply, None where it gives none to a success."""
        if request.command in SILENT_COMMANDS:
            timeout_s = min(self._timeout_s, SILENCE_S)
            return await self._channel.send(request.command, request.arguments, timeout_s=timeout_s)
        return await self._channel.call(request.command, request.arguments, timeout_s=self._timeout_s)


class _Client:
    """One client's connection.

    It is read one piece ahead, so that its end is noticed while a request is carried out.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._ahead = self._read()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Give what the client sends, until it sends no more."""
        while piece := await self._ahead:
            self._ahead = self._read()
            yield piece

    async def while_it_stays(self, work: Coroutine[Any, Any, bytes]) -> bytes:
        """Carry out some work for the client; raises ConnectionError if the client leaves first."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self._ahead), return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self._has_left():
                raise ConnectionAbortedError("the client left")
            return await task
        finally:
            task.cancel()
            await asyncio.wait((task,))

    async def send(self, data: bytes, *, timeout_s: float) -> None:
        """Send this, at the client's speed; raises TimeoutError if it does not read."""
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.cancel()
        await asyncio.gather(self._ahead, return_exceptions=True)
        self._sock.close()

    def _read(self) -> asyncio.Task[bytes]:
        return asyncio.create_task(asyncio.get_running_loop().sock_recv(self._sock, _READ_BYTES))

    def _has_left(self) -> bool:
        """Tell one that left from one that only sends no more: `echo … | socat` waits for its replies."""
        if not self._ahead.done() or (self._ahead.exception() is None and self._ahead.result()):
            return False
        poll = select.poll()
        poll.register(self._sock, 0)
        return bool(poll.poll(0))  # POLLHUP and POLLERR are reported unasked


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a unix socket that only this user may connect to, and remove it at the end.

    A socket that an ended process left behind is replaced. Raises OSError if the path cannot be had: its directory is
    missing or closed, another process serves it, something else is there.
    """
    with _lock(path), socket.socket(socket.AF_UNIX) as listener:
        _remove_abandoned(path)
        # On Linux the file gets its socket's mode, so that it is never open to others: unix_bind() in af_unix.c.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(os.fspath(path))
        own = path.lstat()
        try:
            listener.listen(_BACKLOG)
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(own, path.lstat()):
                    path.unlink()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep others of our kind from the path, who could take a socket for abandoned that is not served yet."""
    lock_path = Path(f"{path}.lock")
    with os.fdopen(os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(lock.fileno()), lock_path.stat())  # or it was removed just now
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise _in_use(path)
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "something else is there", str(path))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(os.fspath(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink()
        return
    except BlockingIOError as error:  # its queue is full
        raise _in_use(path) from error
    raise _in_use(path)


def _in_use(path: Path) -> OSError:
    return OSError(errno.EADDRINUSE, "another process serves it", str(path))


def _reply_line(reply: Reply, request: Request) -> bytes:
    if isinstance(reply, Failure):
        return _error_line(reply.desc, request.echo, error_class=reply.error_class)
    line = _line({"return": reply.value}, request.echo)
    return DELIMITER + line if request.command == "guest-sync-delimited" else line


def _error_line(desc: str, echo: Mapping[str, object] | None = None, *, error_class: str = "GenericError") -> bytes:
    return _line({"error": {"class": error_class, "desc": desc}}, echo or {})


def _line(reply: Mapping[str, object], echo: Mapping[str, object]) -> bytes:
    return json.dumps({**reply, **echo}).encode() + b"\n"
