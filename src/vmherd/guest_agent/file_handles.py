"""What a copy holds in the guest while it goes on: an open file, and one without its name yet; none of it is left."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from vmherd.guest_agent import file_programs, spool
from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import AgentError, CommandFailed
from vmherd.guest_agent.file_errors import FileError, FileUnsuitable, explained
from vmherd.guest_agent.file_programs import CALL_TIMEOUT_S, thawed
from vmherd.guest_agent.holding import eventually, held, uninterrupted
from vmherd.guest_agent.wire import MalformedReply, member

T = TypeVar("T")


class Handle:
    """A file that the agent holds open, under this number. While the guest is frozen its calls wait for the thaw.

    They may be cancelled: what was asked is answered first, since the connection would be lost otherwise.
    """

    def __init__(self, agent: GuestAgent, number: int) -> None:
        self._agent = agent
        self._number = number

    async def read(self, size_bytes: int) -> tuple[bytes, bool]:
        """Give the next bytes, as many at most, and whether the end was reached. Raises what `GuestAgent` raises."""
        return await thawed(lambda: spool.read(self._agent, self._number, size_bytes))

    async def write(self, text: str, size_bytes: int) -> None:
        """Append so many bytes, which are given in base64. Raises what `GuestAgent` raises."""

        def parse(value: object) -> None:
            if member(value, "count", int) != size_bytes:
                raise MalformedReply(f"it wrote only a part of {size_bytes} bytes")

        await thawed(lambda: self._ask("guest-file-write", parse, {"buf-b64": text}))

    async def close(self) -> None:
        """Close it now, to hear whether everything was written. Raises what `GuestAgent` raises."""
        await thawed(lambda: self._ask("guest-file-close", lambda _: None))

    async def _ask(
        self,
        command: str,
        parse: Callable[[object], T],
        words: Mapping[str, object] = MappingProxyType({}),
    ) -> T:
        arguments = {"handle": self._number, **words}
        return await uninterrupted(self._agent.ask(command, parse, arguments, timeout_s=CALL_TIMEOUT_S))


@dataclass
class Place:
    """Where a new file is before it has its name: at `path`, to become `target`; what is at `litter` goes with it.

    Where both paths are the same the file is written in place, and there is no litter. `identity` is what `commit`
    knows the new file by.
    """

    path: str
    target: str
    identity: str = ""
    litter: str = ""


@asynccontextmanager
async def opened(agent: GuestAgent, path: str, mode: str) -> AsyncIterator[Handle]:
    """Hold a file open. Raises FileError and its kinds, and what `GuestAgent` raises."""
    async with AsyncExitStack() as stack:
        try:
            number = await stack.enter_async_context(spool.opened(agent, path, mode))
        except CommandFailed as error:
            raise explained(error, path) from error
        yield Handle(agent, number)


def beside(agent: GuestAgent, path: str) -> AbstractAsyncContextManager[Place]:
    """Hold an empty file in the folder of `path`, or the file there itself where the guest cannot rename files."""

    async def make(name: str) -> Place:
        made = await file_programs.prepare(agent, path, name)
        return Place(*made, litter=made[0]) if made else Place(path, path)

    return _tidied(agent, path, make)


def archive_for(agent: GuestAgent, folder: str) -> AbstractAsyncContextManager[Place]:
    """Hold room for an archive of a folder. Raises FileUnsuitable if the guest cannot have archives."""

    async def make(name: str) -> Place:
        space = await file_programs.make_space(agent, name)
        if space is None:
            why = "a folder takes a POSIX shell and tar in the guest, and an agent that may run programs"
            raise FileUnsuitable(f"{folder}: {why}", path=folder, command="guest-exec")
        return Place(f"{space}/archive.tar", folder, litter=space)

    return _tidied(agent, folder, make)


async def tidy(agent: GuestAgent, place: Place) -> None:
    """Remove what is there beside the target. Raises what `GuestAgent` raises."""
    if place.litter:
        await uninterrupted(file_programs.remove(agent, place.litter))
        place.litter = ""


def _tidied(
    agent: GuestAgent, path: str, make: Callable[[str], Awaitable[Place]]
) -> AbstractAsyncContextManager[Place]:
    """Hold what `make` makes under a new name."""

    async def acquire() -> Place:
        name = _new_name()
        try:
            return await make(name)
        except FileError:
            raise
        except AgentError:
            await eventually(agent, lambda: file_programs.forget(agent, path, name))
            raise

    async def release(place: Place) -> None:
        await eventually(agent, lambda: tidy(agent, place))

    return held(acquire(), release)


def _new_name() -> str:
    return f".vmherd-{secrets.token_hex(8)}"
