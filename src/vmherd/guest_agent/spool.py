"""The files in a guest through which a program's output comes while it runs; the agent itself shows it at the end.

A shell opens the files and becomes the program, so that process id, exit code and signal are the program's own. The
agent reads a regular file on after its end, so the files are read as they grow. A FIFO brings input: the agent holds it
open and never writes to it, for its own writes do not wait and lose what does not fit.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import AgentError, AgentFrozen
from vmherd.guest_agent.holding import held
from vmherd.guest_agent.programs import decode_bytes, pauses
from vmherd.guest_agent.wire import MalformedReply, member

SHELL = "/bin/sh"
FOLDER = "/tmp"  # noqa: S108  (in the guest)
CALL_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 3.0
READ_BYTES = 64 << 10
"""Larger pieces are no faster, and keep the agent from others for longer."""

# The umask is read without a process of its own. Variables are named so that they hide none of the program's.
_SCRIPT = """
{ read -r _vmherd_key; read -r _vmherd_key _vmherd_umask; } </proc/self/status
[ "$_vmherd_key" = Umask: ] || _vmherd_umask=$(umask)
umask 077
set -C
%s
exec 2>"$1.err" >"$1.out" || exit
umask "$_vmherd_umask"
%s
shift
exec "$@"
"""
_PLAIN = _SCRIPT % ("", "")
_WITH_INPUT = _SCRIPT % ('mkfifo "$1.in" || exit', 'exec <"$1.in"')


class Stream(StrEnum):
    """Where a program writes."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of what a program wrote; `offset` counts the bytes of this stream that came before."""

    stream: Stream
    offset: int
    data: bytes


def new_token() -> str:
    """Give the name of a new program's files, which nobody in the guest can guess."""
    return secrets.token_hex(16)


def path_of(token: str, end: str) -> str:
    """Give the path of one of a program's files: `out`, `err` or `in`."""
    return f"{FOLDER}/.vmherd-{token}.{end}"


def wrapped(argv: Sequence[str], token: str, *, with_input: bool) -> list[str]:
    """Give the words that start a program with its output, and perhaps its input, in files."""
    return [SHELL, "-c", _WITH_INPUT if with_input else _PLAIN, "sh", path_of(token, "")[:-1], *argv]


def opened(
    agent: GuestAgent, path: str, mode: str, *, timeout_s: float = CALL_TIMEOUT_S
) -> AbstractAsyncContextManager[int]:
    """Hold a file of the guest open; gives the agent's handle. Raises CommandFailed if there is no such file."""

    async def close(handle: int) -> None:
        with suppress(AgentError):  # a handle that is gone is closed
            await agent.execute("guest-file-close", {"handle": handle}, timeout_s=CLOSE_TIMEOUT_S)

    def parse(value: object) -> int:
        if type(value) is not int:
            raise MalformedReply("a handle is an integer")
        return value

    arguments = {"path": path, "mode": mode}
    return held(agent.ask("guest-file-open", parse, arguments, timeout_s=timeout_s), close)


async def read(agent: GuestAgent, handle: int) -> tuple[bytes, bool]:
    """Give the next piece of a file, and whether its end was reached."""
    arguments = {"handle": handle, "count": READ_BYTES}
    return await agent.ask("guest-file-read", _parse_read, arguments, timeout_s=CALL_TIMEOUT_S)


async def follow(
    agent: GuestAgent,
    token: str,
    has_ended: Callable[[], Awaitable[bool]],
    *,
    offsets: Mapping[Stream, int] = MappingProxyType({}),
) -> AsyncGenerator[Output]:
    """Give a program's output from these offsets on, and what comes until it ends.

    `has_ended` tells whether it writes no more. Raises what `GuestAgent` raises; CommandFailed if the files are gone.
    """
    async with AsyncExitStack() as stack:
        files = []
        for stream in Stream:
            handle = await stack.enter_async_context(opened(agent, path_of(token, stream[3:]), "r"))
            offset = offsets.get(stream, 0)
            if offset:
                arguments = {"handle": handle, "offset": offset, "whence": "set"}
                await agent.execute("guest-file-seek", arguments, timeout_s=CALL_TIMEOUT_S)
            files.append(_GrowingFile(agent, handle, stream, offset))
        waits = pauses()
        while True:
            ended = await has_ended()  # before the last read, which then leaves nothing out
            for file in files:
                async for output in file.news():
                    yield output
                    waits = pauses()
            if ended:
                return
            await asyncio.sleep(next(waits))


class _GrowingFile:
    def __init__(self, agent: GuestAgent, handle: int, stream: Stream, offset: int) -> None:
        self._agent = agent
        self._handle = handle
        self._stream = stream
        self._offset = offset

    async def news(self) -> AsyncIterator[Output]:
        """Give what was written since the last time."""
        arguments = {"handle": self._handle, "count": READ_BYTES}
        while True:
            try:
                data, at_end = await self._agent.ask(
                    "guest-file-read", _parse_read, arguments, timeout_s=CALL_TIMEOUT_S
                )
            except AgentFrozen:
                return  # it goes on after the thaw
            if data:
                yield Output(self._stream, self._offset, data)
                self._offset += len(data)
            if at_end:
                return


def _parse_read(value: object) -> tuple[bytes, bool]:
    data = decode_bytes(value, "buf-b64")
    if len(data) != member(value, "count", int):
        raise MalformedReply("'count' is not the number of bytes")
    return data, member(value, "eof", bool) or not data
