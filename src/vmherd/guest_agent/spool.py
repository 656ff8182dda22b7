"""The files in a guest through which a program's output comes while it runs; the agent itself shows it at the end.

A shell makes a folder, opens all that is in it and becomes the program, so that process id, exit code and signal are
the program's own. It writes to FIFOs, as it would to pipes: a program that opens its /dev/stderr would empty a file.
Behind each a `cat` fills a regular file, which the agent reads as it grows, for it reads one on after its end. Another
FIFO brings input: the agent holds it open and never writes to it, for its own writes do not wait and lose what does not
fit.

The folder holds `out` and `err`, `lost` when there was no room for more, and `end` once nothing more comes there; the
program has `out.pipe`, `err.pipe` and `in`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import AgentFrozen, CommandFailed
from vmherd.guest_agent.holding import eventually, held, uninterrupted
from vmherd.guest_agent.programs import decode_bytes, pauses
from vmherd.guest_agent.wire import MalformedReply, member

SHELL = "/bin/sh"
FOLDER = "/tmp"  # noqa: S108  (in the guest)
CALL_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 3.0
READ_BYTES = 64 << 10
"""Larger pieces are no faster, and keep the agent from others for longer."""

LINGER_S = 1.0
"""How long the output of a program that has ended may still come: what it left behind may hold it open for ever."""

OPEN = b"open\n"
"""What the agent has as the output of a program that was begun: its folder was made and everything is open."""

# The umask is read without a process of its own. Variables are named so that they hide none of the program's. A folder
# that nobody else can enter comes first, since anybody sees names in /tmp. To open one side of a FIFO waits for the
# other, so both are opened at once at first; a shell that is killed here leaves no `cat` that waits. The `cat`s are
# nobody's children: a program would wait for those that it does not know. A program may end before
# they run, so the files are there before.
_SCRIPT = """
{ read -r _vmherd_key; read -r _vmherd_key _vmherd_umask; } </proc/self/status
[ "$_vmherd_key" = Umask: ] || _vmherd_umask=$(umask)
umask 077
mkdir "$1" && mkfifo "$1/out.pipe" "$1/err.pipe" %s || exit
exec 3>&1 4<>"$1/out.pipe" 5<>"$1/err.pipe"
: >"$1/err" >"$1/out"
(
  {
    { cat || : >"$1/lost"; } <"$1/out.pipe" >"$1/out" 4>&- 5>&- &
    { cat || : >"$1/lost"; } <"$1/err.pipe" >"$1/err" 4>&- 5>&- &
    exec 4>&- 5>&-
    wait
    : >"$1/end"
  } >/dev/null 2>&1 3>&- &
)
exec >"$1/out.pipe" 2>"$1/err.pipe" 4>&- 5>&-
umask "$_vmherd_umask"
echo open >&3
exec 3>&-
%s
shift
exec "$@"
"""
_PLAIN = _SCRIPT % ("", "")
_WITH_INPUT = _SCRIPT % ('"$1/in"', 'exec <"$1/in"')

# `tee` would make a file where the program has removed the FIFO.
_FEED = '[ -p "$1" ] && exec cat >"$1"'


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


def folder_of(token: str) -> str:
    """Give the path of the folder that a program's files are in."""
    return f"{FOLDER}/.vmherd-{token}"


def path_of(token: str, name: str) -> str:
    """Give the path of one of a program's files."""
    return f"{folder_of(token)}/{name}"


def wrapped(argv: Sequence[str], token: str, *, with_input: bool) -> list[str]:
    """Give the words that start a program with its output, and perhaps its input, in files."""
    return [SHELL, "-c", _WITH_INPUT if with_input else _PLAIN, "sh", folder_of(token), *argv]


def feeding(token: str) -> list[str]:
    """Give the words that start what passes its own input to a program, and waits until that has room for it."""
    return [SHELL, "-c", _FEED, "sh", path_of(token, "in")]


def opened(
    agent: GuestAgent, path: str, mode: str, *, timeout_s: float = CALL_TIMEOUT_S
) -> AbstractAsyncContextManager[int]:
    """Hold a file of the guest open; gives the agent's handle. Raises CommandFailed if there is no such file."""

    async def close(handle: int) -> None:
        arguments = {"handle": handle}
        await eventually(agent, lambda: agent.execute("guest-file-close", arguments, timeout_s=CLOSE_TIMEOUT_S))

    def parse(value: object) -> int:
        if type(value) is not int:
            raise MalformedReply("a handle is an integer")
        return value

    arguments = {"path": path, "mode": mode}
    return held(agent.ask("guest-file-open", parse, arguments, timeout_s=timeout_s), close)


async def read(agent: GuestAgent, handle: int, size_bytes: int = READ_BYTES) -> tuple[bytes, bool]:
    """Give the next bytes of a file, as many at most, and whether its end was reached."""

    def parse(value: object) -> tuple[bytes, bool]:
        data = decode_bytes(value, "buf-b64")
        at_end = member(value, "eof", bool)
        if len(data) != member(value, "count", int) or len(data) > size_bytes or not (data or at_end):
            raise MalformedReply("'count' is not the number of bytes, or not one that was asked for")
        return data, at_end

    arguments = {"handle": handle, "count": size_bytes}
    # A call that is cancelled would cost everybody the connection.
    return await uninterrupted(agent.ask("guest-file-read", parse, arguments, timeout_s=CALL_TIMEOUT_S))


async def follow(
    agent: GuestAgent,
    token: str,
    has_ended: Callable[[], Awaitable[bool]],
    *,
    offsets: Mapping[Stream, int] = MappingProxyType({}),
    linger_s: float = LINGER_S,
) -> AsyncGenerator[Output]:
    """Give a program's output from these offsets on, and what comes until it ends.

    `has_ended` tells whether the program has ended. Its output may take a moment longer; after `linger_s` the rest is
    left to those that it started. Raises what `GuestAgent` raises; CommandFailed if the files are gone, and at the end
    if the guest had no room for all of it.
    """
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    async with AsyncExitStack() as stack:
        files = []
        for stream in Stream:
            handle = await stack.enter_async_context(opened(agent, path_of(token, stream[3:]), "r"))
            offset = offsets.get(stream, 0)
            if offset:
                arguments = {"handle": handle, "offset": offset, "whence": "set"}
                await uninterrupted(agent.execute("guest-file-seek", arguments, timeout_s=CALL_TIMEOUT_S))
            files.append(_GrowingFile(agent, handle, stream, offset))
        waits = pauses()
        lingers_until_s = None
        while True:
            # Before the last read, which then leaves nothing out.
            is_last = False
            if await has_ended():
                if lingers_until_s is None:
                    lingers_until_s = loop.time() + linger_s
                    waits = pauses()
                is_last = loop.time() >= lingers_until_s or await _is_there(agent, path_of(token, "end"))
            has_more = True
            while has_more:
                has_more = False
                for file in files:  # by turns, for either may have no end
                    try:
                        output, at_end = await file.read()
                    except AgentFrozen:
                        is_last = False  # it goes on after the thaw
                        continue
                    has_more |= not at_end
                    if output:
                        yield output
                        waits = pauses()
            if is_last:
                break
            await asyncio.sleep(next(waits))
    if await _is_there(agent, path_of(token, "lost")):
        why = f"some of the output is lost: the guest had no room for it in {FOLDER}"
        raise CommandFailed("GenericError", why, command="guest-exec", elapsed_s=loop.time() - started_s)


async def _is_there(agent: GuestAgent, path: str) -> bool:
    try:
        async with opened(agent, path, "r"):
            return True
    except (CommandFailed, AgentFrozen):
        return False


class _GrowingFile:
    def __init__(self, agent: GuestAgent, handle: int, stream: Stream, offset: int) -> None:
        self._agent = agent
        self._handle = handle
        self._stream = stream
        self._offset = offset

    async def read(self) -> tuple[Output | None, bool]:
        """Give the next piece, if there is one, and whether it is the last for now."""
        data, at_end = await read(self._agent, self._handle)
        output = Output(self._stream, self._offset, data) if data else None
        self._offset += len(data)
        return output, at_end
