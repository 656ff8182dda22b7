"""`vmherd agent … cp`: the files of a guest whose agent is on a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

from vmherd.cli.agent_errors import explained
from vmherd.guest_agent import AgentError, GuestAgent, files
from vmherd.guest_agent.address import Address
from vmherd.guest_agent.files import FileDescription, FileDigest

T = TypeVar("T")
Part = FileDescription | bytes | FileDigest


class AgentFiles:
    """The files of an agent's guest: `copying.Files`."""

    def __init__(self, runner: asyncio.Runner, agent: GuestAgent, address: Address) -> None:
        self._runner = runner
        self._agent = agent
        self._address = address

    def describe(self, path: str) -> FileDescription:
        """See `copying.Files`."""
        return self._run(files.describe(self._agent, path))

    def read(self, path: str, *, archive: bool) -> Generator[Part]:
        """See `copying.Files`."""
        parts = self._parts(path, archive=archive)
        try:
            while (part := self._run(_next(parts))) is not None:
                yield part
        finally:
            self._run(parts.aclose())

    def write(
        self, path: str, pieces: Iterable[bytes], *, archive: bool, mode: int | None, size_bytes: int | None
    ) -> FileDigest:
        """See `copying.Files`."""

        async def write() -> FileDigest:
            async with files.open_writer(
                self._agent, path, mode=mode, archive=archive, size_bytes=size_bytes
            ) as writer:
                for piece in pieces:
                    await writer.write(piece)
                return await writer.finish()

        return self._run(write())

    async def _parts(self, path: str, *, archive: bool) -> AsyncGenerator[Part]:
        async with files.open_reader(self._agent, path, archive=archive) as reader:
            yield reader.description
            async with aclosing(aiter(reader)) as chunks:
                async for chunk in chunks:
                    yield chunk
            yield await reader.finish()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(work)
        except AgentError as error:
            raise explained(error, self._address) from error


async def _next(parts: AsyncGenerator[Part]) -> Part | None:
    return await anext(parts, None)
