"""`vmherd exec`: a program in a guest, as if it ran here."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Annotated

import typer
from google.protobuf.empty_pb2 import Empty

from vmherd.api.v1.process_pb2 import ExecRequest, Process, ProcessEvent, ProcessOutput, RunRequest, StartProcessRequest
from vmherd.cli.attending import Command, Env, NoStdin, OwnInput, Timeout, attend, own_input, show
from vmherd.cli.report import printable, to_json
from vmherd.cli.session import Name, Session, connected
from vmherd.cli.values import duration, pairs
from vmherd.client import Client
from vmherd.guest_agent import Output, Stream

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 15.0
"""How long the controller may take to end a program before we leave it alone with that."""

INPUT_AHEAD_MAX_BYTES = 1 << 20
"""How much of our input may be on its way: what is ahead of Ctrl-C must not keep it from being heard."""

app = typer.Typer()

STREAMS = {ProcessOutput.STDOUT: Stream.STDOUT, ProcessOutput.STDERR: Stream.STDERR}


@app.command("exec", rich_help_panel="Guests")
@connected
def exec_(
    session: Session,
    name: Name,
    *,
    command: Command,
    env: Env = None,
    no_stdin: NoStdin = False,
    timeout: Timeout = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave it running and print its id, for `vmherd process`.")
    ] = False,
) -> None:
    """Runs a command in a guest with our standard input and output, and exits with its code.

    The code is 128 and the signal's number where a signal ended it, and 6 where its time was up. Ctrl-C ends the
    command in the guest; a second one leaves at once.
    """
    own = OwnInput() if no_stdin else own_input()
    environment, limit = pairs(env or [], "--env"), duration(timeout)
    if detach:
        if own.descriptor is not None and not os.isatty(own.descriptor):
            raise typer.BadParameter("a detached command gets at most 1 MiB of input that is there at once; try -n")
        start = StartProcessRequest(name=name, command=command, environment=environment, input=own.data, timeout=limit)
        process = session.client.processes.StartProcess(start, timeout=START_TIMEOUT_S)
        print(to_json(process) if session.as_json else process.id)
        return
    request = RunRequest(name=name, command=command, environment=environment, timeout=limit)
    if own.descriptor is None:
        request.input = own.data
    raise typer.Exit(asyncio.run(_attend(session, request, own)))


async def _attend(session: Session, request: RunRequest, own: OwnInput) -> int:
    on_event = print_event if session.as_json else print_notice
    process = RemoteProcess(session.client, request, input_follows=own.descriptor is not None, on_event=on_event)
    interruption = await attend(process, own, _show_nothing if session.as_json else show)
    return process.exit_code if interruption is None else 128 + interruption


def print_event(event: ProcessEvent) -> None:
    """Prints an event as JSON."""
    print(to_json(event), flush=True)


def print_notice(event: ProcessEvent) -> None:
    """Prints what is not as asked; output is printed elsewhere."""
    if event.notice:
        print(f"vmherd: {printable(event.notice)}", file=sys.stderr)


def _show_nothing(_: Output) -> None:
    """The events are shown as they are."""


def output_of(event: ProcessEvent) -> Output | None:
    """The output that an event brings, with its exact bytes."""
    if event.WhichOneof("event") != "output":
        return None
    output = event.output
    data = output.raw if output.HasField("raw") else output.text.encode()
    return Output(STREAMS[output.stream], output.offset, data)


class RemoteProcess:
    """A program that the controller runs for us, `attending.Attended`. `exit_code` is its own once it has ended."""

    def __init__(
        self, client: Client, request: RunRequest, *, input_follows: bool, on_event: Callable[[ProcessEvent], None]
    ) -> None:
        self.exit_code = 0
        self._client = client
        self._on_event = on_event
        self._failure: Exception | None = None
        self._sent_bytes = self._taken_bytes = 0
        self._taken = asyncio.Event()
        self._requests: queue.SimpleQueue[ExecRequest | None] = queue.SimpleQueue()
        self._requests.put(ExecRequest(run=request, input_follows=input_follows))
        self._events: Iterator[ProcessEvent] = client.processes.Exec(self._sent())

    async def output(self) -> AsyncGenerator[Output]:
        """What it writes, until it has ended; raises `VmherdError`."""
        try:
            while event := await asyncio.to_thread(next, self._events, None):
                if self._failure:
                    raise self._failure
                if event.HasField("input_taken"):
                    self._taken_bytes = event.input_taken
                    self._taken.set()
                    continue
                self._on_event(event)
                if event.process.state == Process.EXITED:
                    self.exit_code = event.process.exit_code
                if output := output_of(event):
                    yield output
        finally:
            self._requests.put(None)

    async def write(self, data: bytes) -> None:
        """Gives it more input; returns when there is room for yet more."""
        while self._sent_bytes - self._taken_bytes >= INPUT_AHEAD_MAX_BYTES:
            self._taken.clear()
            await self._taken.wait()
        self._sent_bytes += len(data)
        self._requests.put(ExecRequest(input=data))

    async def close_input(self) -> None:
        """Tells it that there is no more input."""
        self._requests.put(ExecRequest(input=b""))

    async def end(self) -> None:
        """Asks the controller to end it; without an answer we hang up, which ends it as well."""
        self._requests.put(ExecRequest(end=Empty()))
        await asyncio.sleep(END_TIMEOUT_S)
        self._client.close()

    def fail(self, error: Exception) -> None:
        """Ends the call; the output raises this."""
        self._failure = error
        self._client.close()

    def _sent(self) -> Iterator[ExecRequest]:
        while request := self._requests.get():
            yield request
