"""What a copy holds in the guest while it goes on: an open file, and one without its name yet; none of it is left."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass

from vmherd.guest_agent import file_programs
from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import AgentError, CommandFailed
from vmherd.guest_agent.file_errors import FileError, FileUnsuitable, explained
from vmherd.guest_agent.file_programs import CALL_TIMEOUT_S
from vmherd.guest_agent.holding import held, uninterrupted
from vmherd.guest_agent.wire import MalformedReply

CLOSE_TIMEOUT_S = 5.0


class Handle:
    """A file that the agent holds open, under this number."""

    def __init__(self, agent: GuestAgent, number: int) -> None:
        self.number = number
        self._agent = agent
        self._is_open = True

    async def close(self) -> None:
        """Close it, once: the agent forgets a handle even where it could not write what it had still buffered."""
        if self._is_open:
            self._is_open = False
            arguments = {"handle": self.number}
            await uninterrupted(self._agent.execute("guest-file-close", arguments, timeout_s=CLOSE_TIMEOUT_S))


@dataclass
class Place:
    """Where a new file is before it has its name: at `path`, to become `target`; what is at `litter` goes with it.

    Where both paths are the same the file is written in place, and there is no litter.
    """

    path: str
    target: str
    litter: str = ""


def opened(agent: GuestAgent, path: str, mode: str) -> AbstractAsyncContextManager[Handle]:
    """Hold a file open. Raises FileError and its kinds, and what `GuestAgent` raises."""

    async def open_() -> Handle:
        arguments = {"path": path, "mode": mode}
        try:
            number = await agent.ask("guest-file-open", _parse_handle, arguments, timeout_s=CALL_TIMEOUT_S)
        except CommandFailed as error:
            raise explained(error, path) from error
        return Handle(agent, number)

    async def close(handle: Handle) -> None:
        with suppress(AgentError):  # a writer has closed it before, and was told if something was lost
            await handle.close()

    return held(open_(), close)


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
    # Where something is suppressed the caller is leaving with an error of its own, which says more.

    async def acquire() -> Place:
        name = _new_name()
        try:
            return await make(name)
        except FileError:
            raise
        except AgentError:
            with suppress(AgentError):
                await file_programs.forget(agent, path, name)
            raise

    async def release(place: Place) -> None:
        with suppress(AgentError):
            await tidy(agent, place)

    return held(acquire(), release)


def _new_name() -> str:
    return f".vmherd-{secrets.token_hex(8)}"


def _parse_handle(value: object) -> int:
    if type(value) is not int:
        raise MalformedReply("a handle is an integer")
    return value
