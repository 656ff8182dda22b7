"""A program in a guest, shown here as if it ran here: its output, our input, Ctrl-C, whatever the way to the guest."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import stat
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Protocol, TextIO

import typer

from vmherd.cli.session import DAY_S
from vmherd.guest_agent import AgentError, Output, Stream
from vmherd.model.errors import FailedPrecondition, InvalidArgument, VmherdError

AT_ONCE_MAX_BYTES = 1 << 20
"""Input that is there at once and no larger goes along with the command, which is cheaper for the guest."""

AT_ONCE_S = 0.02
READ_BYTES = 64 << 10
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Command = Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The command's words; no shell.")]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="KEY=VALUE", help="An environment variable, in place of all; may be repeated."),
]
NoStdin = Annotated[bool, typer.Option("--no-stdin", "-n", help="Give it no standard input, in place of ours.")]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="S", min=0.001, max=DAY_S, help="End it after this time. Default: never."),
]


class Attended(Protocol):
    """A program that runs as long as somebody attends to it; `guest_agent.Process` is one."""

    def output(self) -> AsyncGenerator[Output]:
        """What it writes, until it has ended."""

    async def write(self, data: bytes) -> None:
        """Gives it more input; returns when there is room for yet more."""

    async def close_input(self) -> None:
        """Tells it that there is no more input."""

    async def end(self) -> object:
        """Ends it; its output comes to an end then."""

    def fail(self, error: Exception) -> None:
        """Lets the output raise this."""


@dataclass(frozen=True)
class OwnInput:
    """Our standard input: what was there at once, and the descriptor to read on from where there may be more."""

    data: bytes = b""
    descriptor: int | None = None


def own_input() -> OwnInput:
    """What our standard input has for a program; nothing where it is closed, empty or /dev/null.

    Raises:
        InvalidArgument: it cannot be read.
    """
    try:
        descriptor = sys.stdin.fileno()
        status = os.fstat(descriptor)
    except (AttributeError, ValueError, OSError):
        return OwnInput()
    if stat.S_ISCHR(status.st_mode):
        is_null = status.st_rdev == os.stat(os.devnull).st_rdev
        return OwnInput() if is_null else OwnInput(descriptor=descriptor)
    try:
        return _at_once(descriptor)
    except OSError as error:
        raise InvalidArgument(f"the standard input cannot be read: {error.strerror}") from error


def _at_once(descriptor: int) -> OwnInput:
    data = bytearray()
    while len(data) <= AT_ONCE_MAX_BYTES:
        if not select.select([descriptor], [], [], AT_ONCE_S)[0]:
            return OwnInput(bytes(data), descriptor)
        piece = os.read(descriptor, READ_BYTES)
        if not piece:
            return OwnInput(bytes(data))
        data += piece
    return OwnInput(bytes(data), descriptor)


def show(output: Output) -> None:
    """Writes output to where it belongs; raises `BrokenPipeError` if nobody reads it."""
    stream: TextIO = sys.stdout if output.stream is Stream.STDOUT else sys.stderr
    stream.buffer.write(output.data)
    stream.flush()


async def attend(process: Attended, own: OwnInput, show: Callable[[Output], None]) -> int | None:
    """Shows a program's output and gives it our input until it has ended.

    Gives the number of the signal that interrupted us, SIGPIPE if nobody reads the output: then the program was told to
    end. A second interruption ends us at once. Raises what `process.output` raises.
    """
    loop = asyncio.get_running_loop()
    interruption: int | None = None
    beside: set[asyncio.Task[None]] = set()

    def do(work: Coroutine[None, None, object]) -> None:
        task = loop.create_task(_or_fail(process, work))
        beside.add(task)
        task.add_done_callback(beside.discard)

    def interrupt(number: int) -> None:
        nonlocal interruption
        if interruption is not None:
            os._exit(128 + number)  # a thread that waits for a full pipe would hold a gentler end
        interruption = number
        do(process.end())

    for number in INTERRUPTIONS:
        loop.add_signal_handler(number, interrupt, number)
    if own.descriptor is not None:
        do(_feed(process, own, own.descriptor))
    try:
        async with aclosing(process.output()) as outputs:
            async for output in outputs:
                if interruption == signal.SIGPIPE:
                    continue
                try:
                    await asyncio.to_thread(show, output)  # a full pipe must not keep Ctrl-C from being heard
                except BrokenPipeError:
                    _discard(output.stream)
                    interrupt(signal.SIGPIPE)
                except OSError as error:
                    _discard(output.stream)
                    why = f"the command was ended, for its output cannot be written here: {error.strerror}"
                    raise FailedPrecondition(why, reason="OUTPUT_NOT_WRITABLE") from error
    except (AgentError, VmherdError):
        if interruption is None:
            raise
        print("vmherd: the end of the command was not seen", file=sys.stderr)
    finally:
        for number in INTERRUPTIONS:
            loop.remove_signal_handler(number)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    return interruption


async def _feed(process: Attended, own: OwnInput, descriptor: int) -> None:
    data = own.data or await _read(descriptor)
    while data:
        await process.write(data)
        data = await _read(descriptor)
    await process.close_input()


async def _read(descriptor: int) -> bytes:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    try:
        loop.add_reader(descriptor, readable.set)
    except PermissionError:  # a file, which never lets one wait
        return os.read(descriptor, READ_BYTES)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, READ_BYTES)


async def _or_fail(process: Attended, work: Coroutine[None, None, object]) -> None:
    try:
        await work
    except (AgentError, VmherdError, OSError) as error:
        process.fail(error)


def _discard(stream: Stream) -> None:
    """Lets what is left in the buffer go nowhere; Python would complain about it at its end."""
    broken = sys.stdout if stream is Stream.STDOUT else sys.stderr
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, broken.fileno())
    os.close(null)
