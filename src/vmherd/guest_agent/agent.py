"""The public face of a guest agent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from vmherd.guest_agent.address import Address
from vmherd.guest_agent.channel import Channel
from vmherd.guest_agent.errors import (
    AgentError,
    AgentFrozen,
    AgentUnavailable,
    CommandDisabled,
    CommandFailed,
    CommandNotFound,
    CommandUnavailable,
    ProtocolError,
)
from vmherd.guest_agent.wire import Failure, MalformedReply, Success, member

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CommandInfo:
    """What the agent says of one of its commands."""

    enabled: bool
    success_response: bool


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """What the agent says of itself: its version, and its commands by name."""

    version: str
    commands: Mapping[str, CommandInfo]


class GuestAgent:
    """A QEMU guest agent, reached through the socket of its channel.

    ::

        async with GuestAgent("/run/vm/agent.sock") as agent:
            print(await agent.execute("guest-get-osinfo", timeout_s=5))

    The address is the path of a unix socket, or a text such as `unix:/run/vm/agent.sock`, `tcp:127.0.0.1:1234` or
    `tcp:[::1]:1234`, or an Address; ValueError says what is wrong with it.

    Nothing is connected before the first call. An agent hears one client at a time, so make one GuestAgent for each
    socket and share it. Any number of tasks may call; the agent works on one call at a time, in the order in which
    they came. A call that is cancelled or misses its deadline never disturbs another.

    Every call raises AgentUnavailable or one of its kinds if the agent cannot be reached, CommandUnavailable or one of
    its kinds if the agent does not run the command, CommandFailed if it tried and failed, and ProtocolError if it
    answers nonsense. A reply takes less than 100 MiB of memory, whatever it is.
    """

    def __init__(self, address: str | os.PathLike[str] | Address) -> None:
        self._channel = Channel(address)
        self._info: AgentInfo | None = None
        self._info_session = self._channel.session
        self._background: set[asyncio.Task[None]] = set()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float) -> object:
        """Run one of the agent's commands and give its JSON value as it came, with exact integers.

        The deadline covers the wait for earlier calls too. Commands that never report success need `send`.
        Raises TypeError or ValueError for arguments that JSON cannot carry, and for a `count` of guest-file-read
        above 32 MiB.
        """
        started_s = asyncio.get_running_loop().time()
        reply = await self._channel.call(command, arguments, timeout_s=timeout_s)
        if isinstance(reply, Failure):
            raise await self._refusal(command, reply, started_s, timeout_s)
        return reply.value

    async def send(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float) -> None:
        """Send a command that the agent answers only if it fails: guest-shutdown and guest-suspend-*.

        Returns once the agent has taken the command, or if the guest went away with the command at hand, or if the
        agent was silent until the deadline. That the command was carried out is seen elsewhere: by QMP events, or by
        the end of the VM.
        """
        started_s = asyncio.get_running_loop().time()
        try:
            failure = await self._channel.send(command, arguments, timeout_s=timeout_s)
        except AgentUnavailable as silence:
            if not silence.outcome_unknown:
                raise
        else:
            if failure is not None:
                raise await self._refusal(command, failure, started_s, timeout_s)

    async def ask(
        self,
        command: str,
        parse: Callable[[object], T],
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float,
    ) -> T:
        """Run a command and give its value as `parse` understands it.

        Where `parse` raises MalformedReply the caller gets ProtocolError.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        value = await self.execute(command, arguments, timeout_s=timeout_s)
        try:
            return parse(value)
        except MalformedReply as error:
            raise ProtocolError(
                f"{command}: not the value it should be: {error}",
                command=command,
                elapsed_s=loop.time() - started,
            ) from error

    async def ping(self, *, timeout_s: float) -> None:
        """Return once the agent answers."""
        await self.execute("guest-ping", timeout_s=timeout_s)

    async def info(self, *, timeout_s: float) -> AgentInfo:
        """Ask the agent for its version and for the commands that it has and runs right now."""
        session = self._channel.session
        info = await self.ask("guest-info", _parse_info, timeout_s=timeout_s)
        if session == self._channel.session:
            self._info, self._info_session = info, session
        return info

    def set_port_open(self, port_open: bool | None, why: str = "") -> None:
        """Say whether an agent in the guest holds its end of the channel open; None if that is not known.

        Only QEMU knows: `frontend-open` of `query-chardev`, and the event VSERPORT_CHANGE. While it is closed every
        call raises AgentNotRunning at once, also one that is waiting for its reply; `why` says in its error what closed
        it, for instance "the guest was reset".
        """
        self._channel.set_port_open(port_open, why)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do work that nobody waits for, until `close`."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Close the connection for good: calls on their way, and later ones, raise AgentNotConnected."""
        for task in self._background:
            task.cancel()
        await self._channel.close()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _refusal(self, command: str, failure: Failure, started_s: float, timeout_s: float) -> AgentError:
        """Give the error for a command that the agent did not carry out."""
        loop = asyncio.get_running_loop()
        if failure.error_class != "CommandNotFound":
            return CommandFailed(failure.error_class, failure.desc, command=command, elapsed_s=loop.time() - started_s)
        kind = await self._kind_of_refusal(command, deadline_s=started_s + timeout_s)
        return kind(f"{command}: {failure.desc}", command=command, elapsed_s=loop.time() - started_s)

    async def _kind_of_refusal(self, command: str, *, deadline_s: float) -> type[CommandUnavailable]:
        """Find out why the agent does not run `command`.

        Its error has one class for all reasons and a text for each version, so guest-info has to tell.
        """
        if command == "guest-info":
            return CommandUnavailable
        loop = asyncio.get_running_loop()
        try:
            info = self._info if self._info_session == self._channel.session else None
            # What was enabled and is refused has changed since.
            if info is None or (command in info.commands and info.commands[command].enabled):
                info = await self.info(timeout_s=deadline_s - loop.time())
            known = info.commands.get(command)
            if known is None:
                return CommandNotFound
            # While it is frozen an agent calls most commands disabled, so this is asked even if guest-info has told.
            status = await self._channel.call("guest-fsfreeze-status", None, timeout_s=deadline_s - loop.time())
        except AgentError:
            # The refusal itself is certain and is what the caller has to hear of.
            return CommandUnavailable
        if isinstance(status, Success) and status.value == "frozen":
            return AgentFrozen
        return CommandUnavailable if known.enabled else CommandDisabled


def _parse_info(value: object) -> AgentInfo:
    commands = member(value, "supported_commands", list)
    return AgentInfo(
        version=member(value, "version", str),
        commands={
            member(command, "name", str): CommandInfo(
                enabled=member(command, "enabled", bool),
                success_response=member(command, "success-response", bool),
            )
            for command in commands
        },
    )
