"""A guest agent without a guest, for tests that need one that is slow, wrong or gone.

Left alone it answers as qemu-ga 7.2 does behind QEMU's serial port, and passes the same contract tests. The port knows
nothing of connections: what an earlier client sent is carried out, and its reply goes to whoever is connected then.
A test replaces single answers to make the agent misbehave::

    async with FakeAgent(path) as fake:
        fake.answers["guest-ping"] = my_answer
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

_CAPTURED_BYTES = 16 << 20
_ALLOWED_WHILE_FROZEN = {
    "guest-ping",
    "guest-info",
    "guest-sync",
    "guest-sync-delimited",
    "guest-fsfreeze-status",
    "guest-fsfreeze-thaw",
}
_SILENT = {"guest-shutdown", "guest-suspend-disk", "guest-suspend-ram", "guest-suspend-hybrid"}


def _line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


@dataclass(frozen=True)
class Request:
    """A request that has reached the agent, with the replies that it can get."""

    command: str
    arguments: dict[str, Any]
    id: Any

    def success(self, value: object) -> bytes:
        reply = _line({"return": value, "id": self.id})
        return b"\xff" + reply if self.command == "guest-sync-delimited" else reply

    def failure(self, error_class: str, desc: str) -> bytes:
        return _line({"id": self.id, "error": {"class": error_class, "desc": desc}})


class HangUp(Exception):
    """Raised by an answer: the agent sends this much and closes the connection."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data


class _CommandError(Exception):
    """An honest command that fails as the real one does."""


Answer = Callable[[Request], Awaitable[bytes]]


class Held:
    """An answer that waits: `received` tells that the agent has the request, `release` lets it answer."""

    def __init__(self) -> None:
        self.received = asyncio.Event()
        self.release = asyncio.Event()

    async def __call__(self, request: Request) -> bytes:
        self.received.set()
        await self.release.wait()
        return request.success("held")


async def never(_: Request) -> bytes:
    """Answer nothing, ever."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def hang_up(_: Request) -> bytes:
    """Close the connection in place of an answer."""
    raise HangUp


def raw(text: str) -> Answer:
    """Give an answer of exactly this text, in which ID stands for the id of the request."""

    async def answer(request: Request) -> bytes:
        return text.replace("ID", str(request.id)).encode()

    return answer


def value(value: Any) -> Answer:
    """Give an answer that reports success with this value."""

    async def answer(request: Request) -> bytes:
        return request.success(value)

    return answer


class FakeAgent:
    """An agent on the unix socket at `path`.

    `requests` holds all that it was asked, in order, and `clients` counts those that it has heard.
    """

    def __init__(self, path: Path, *, blocked: Collection[str] = (), frozen: bool = False) -> None:
        self.path = path
        self.blocked = blocked
        self.frozen = frozen
        self.answers: dict[str, Answer] = {}
        self.requests: list[Request] = []
        self.clients = 0
        self._client_came = asyncio.Condition()
        self._commands: dict[str, Callable[[dict[str, Any]], object]] = {
            "guest-ping": lambda _: {},
            "guest-sync": lambda arguments: arguments["id"],
            "guest-sync-delimited": lambda arguments: arguments["id"],
            "guest-info": lambda _: self._info(),
            "guest-get-time": lambda _: time.time_ns(),
            "guest-get-host-name": lambda _: {"host-name": socket.gethostname()},
            "guest-get-timezone": lambda _: {"zone": "UTC", "offset": 0},
            "guest-get-osinfo": lambda _: {"id": "fake", "pretty-name": "Fake 1", "machine": "x86_64"},
            "guest-network-get-interfaces": lambda _: [
                {"name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": []}
            ],
            "guest-fsfreeze-status": lambda _: "frozen" if self.frozen else "thawed",
            "guest-exec": self._exec,
            "guest-exec-status": self._exec_status,
            "guest-fsfreeze-freeze": lambda _: self._set_frozen(True),
            "guest-fsfreeze-freeze-list": lambda _: self._set_frozen(True),
            "guest-fsfreeze-thaw": lambda _: self._set_frozen(False),
        } | {command: lambda _: None for command in _SILENT}
        self._programs: dict[int, _Program] = {}
        self._received = bytearray()

    async def start(self) -> None:
        self._inbox: asyncio.Queue[Request | bytes] = asyncio.Queue()
        self._port = asyncio.Lock()
        self._attached = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._received.clear()
        self._server = await self._listen()
        self._work_task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        self._server.close()
        self._work_task.cancel()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(self._work_task, *self._serving, return_exceptions=True)
        for program in self._programs.values():
            program.close()
        self._programs.clear()

    def asked(self) -> list[str]:
        """Give the names of the commands that the agent was asked, in order, without those that synchronize."""
        return [request.command for request in self.requests if request.command != "guest-sync-delimited"]

    async def wait_for_clients(self, count: int) -> None:
        """Return once this many clients have been heard."""
        async with self._client_came:
            await self._client_came.wait_for(lambda: self.clients >= count)

    async def send(self, data: bytes) -> None:
        """Send this to whoever is connected, or to the next one, whether it was asked for or not."""
        await self._attached.wait()
        self._client.write(data)
        with contextlib.suppress(ConnectionError):  # what a client that left did not read is lost
            await self._client.drain()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._serve, self.path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self._writers.add(writer)
        try:
            async with self._port:  # a second client is connected and hears nothing
                self._client = writer
                self._attached.set()
                async with self._client_came:
                    self.clients += 1
                    self._client_came.notify_all()
                while data := await reader.read(1 << 16):
                    for item in self._parse(data):
                        self._inbox.put_nowait(item)
        except ConnectionError:
            pass  # the client left without reading everything
        finally:
            self._attached.clear()
            writer.transport.abort()
            self._writers.remove(writer)
            self._serving.remove(task)

    async def _work(self) -> None:
        while True:
            item = await self._inbox.get()
            try:
                await self.send(item if isinstance(item, bytes) else await self._answer(item))
            except HangUp as hang_up:
                await self.send(hang_up.data)
                self._client.close()

    async def _answer(self, request: Request) -> bytes:
        self.requests.append(request)
        command = request.command
        if answer := self.answers.get(command):
            return await answer(request)
        if command not in self._commands:
            return request.failure("CommandNotFound", f"The command {command} has not been found")
        if command in self.blocked:
            return request.failure("CommandNotFound", f"Command {command} has been disabled")
        if self.frozen and command not in _ALLOWED_WHILE_FROZEN:
            return request.failure(
                "CommandNotFound", f"Command {command} has been disabled: the agent is in frozen state"
            )
        try:
            value = self._commands[command](request.arguments)
        except _CommandError as error:
            return request.failure("GenericError", str(error))
        return b"" if command in _SILENT else request.success(value)

    def _parse(self, data: bytes) -> Iterator[Request | bytes]:
        """Give requests, and the error lines for what is none; an unfinished request outlives its client."""
        for piece in re.split(rb"(\xff|\n)", data):
            if piece == b"\xff":
                self._received.clear()
                yield _line({"error": {"class": "GenericError", "desc": "JSON parse error, stray '\ufffd'"}})
            elif piece != b"\n":
                self._received += piece
            elif text := self._received.strip():
                self._received.clear()
                try:
                    message = json.loads(text)
                    yield Request(message["execute"], message.get("arguments", {}), message.get("id"))
                except (ValueError, TypeError, KeyError) as error:
                    yield _line({"error": {"class": "GenericError", "desc": f"JSON parse error, {error!r}"}})

    def _info(self) -> object:
        return {
            "version": "7.2.22",
            "supported_commands": [
                {
                    "name": name,
                    "enabled": name not in self.blocked and (not self.frozen or name in _ALLOWED_WHILE_FROZEN),
                    "success-response": name not in _SILENT,
                }
                for name in self._commands
            ],
        }

    def _set_frozen(self, frozen: bool) -> int:
        """Freezes or thaws one file system, which is all there is."""
        changed, self.frozen = self.frozen != frozen, frozen
        return int(changed)

    def _exec(self, arguments: dict[str, Any]) -> object:
        try:
            program = _Program(arguments)
        except OSError as error:
            raise _CommandError(f"Guest agent command failed, error was '{error}'") from error
        self._programs[program.process.pid] = program
        return {"pid": program.process.pid}

    def _exec_status(self, arguments: dict[str, Any]) -> object:
        program = self._programs.get(arguments["pid"])
        if program is None:
            raise _CommandError("Invalid parameter 'pid'")
        code = program.process.poll()
        if code is None:
            return {"exited": False}
        del self._programs[arguments["pid"]]
        try:
            return {
                "exited": True,
                **({"exitcode": code} if code >= 0 else {"signal": -code}),
                **_captured("out", program.stdout),
                **_captured("err", program.stderr),
            }
        finally:
            program.close()


class FakeAgentOnTcp(FakeAgent):
    """The same on a TCP port of this host, as behind QEMU's `-chardev socket,host=…,port=…`."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.port = 0

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        return server


class _Program:
    """A program that `guest-exec` started, on this host."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        with contextlib.ExitStack() as files:
            self.stdout, self.stderr, stdin = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            stdin.write(base64.b64decode(arguments.get("input-data", "")))
            stdin.seek(0)
            self.process = subprocess.Popen(
                [arguments["path"], *arguments.get("arg", [])],
                env=dict(item.split("=", 1) for item in arguments["env"]) if "env" in arguments else None,
                stdin=stdin,
                stdout=self.stdout,
                stderr=self.stderr,
            )
            self._files = files.pop_all()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._files.close()


def _captured(stream: str, file: IO[bytes]) -> dict[str, object]:
    file.seek(0)
    data = file.read()
    if not data:
        return {}
    return {
        f"{stream}-data": base64.b64encode(data[:_CAPTURED_BYTES]).decode(),
        f"{stream}-truncated": len(data) > _CAPTURED_BYTES,
    }
