"""QEMU's control socket without QEMU, for tests that need it to say something at a moment of their choice."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

GREETING = {"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}


def event(name: str, **data: object) -> dict[str, object]:
    """An event as QEMU tells it."""
    return {"event": name, "data": data, "timestamp": {"seconds": 0, "microseconds": 0}}


class FakeQmp:
    """A control socket for one client after the other, of a machine that runs and whose agent's port is closed.

    `results` has what other commands return; an Exception among them is raised, `EOFError` hangs up, any other is an
    error with its text. `asked` has the commands that came, `events` what is told after the answer to one.
    """

    def __init__(self, path: Path, results: Mapping[str, object] | None = None) -> None:
        self.connected = asyncio.Event()
        self.asked: list[str] = []
        self.events: dict[str, Mapping[str, object]] = {}
        self._path = path
        self._results = {"query-status": {"running": True}, "query-chardev": []} | dict(results or {})
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.hang_up()
        self._server.close()
        await self._server.wait_closed()

    def say(self, message: Mapping[str, object]) -> None:
        """Tells the client something."""
        assert self._writer is not None
        self._writer.write(json.dumps(message).encode() + b"\r\n")

    def hang_up(self) -> None:
        """Ends the connection, where there is one, after what was said."""
        if self._writer is not None:
            self._writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # the client left without reading everything
            await self._converse(reader, writer)
        writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.connected.set()
        self.say(GREETING)
        while data := await reader.read(1 << 16):  # a client waits for each answer, and ends no line
            request = json.loads(data)
            command = request["execute"]
            self.asked.append(command)
            result = self._results.get(command, {})
            if isinstance(result, EOFError):
                break
            failed = isinstance(result, Exception)
            answer = {"error": {"class": "GenericError", "desc": str(result)}} if failed else {"return": result}
            self.say(answer | ({"id": request["id"]} if "id" in request else {}))
            if not failed and command in self.events:
                self.say(self.events[command])
