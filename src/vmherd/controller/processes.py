"""ProcessService: programs in a guest, with their whole output."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import structlog
from google.protobuf.empty_pb2 import Empty

from vmherd import guest_agent
from vmherd.api.v1 import process_pb2, process_pb2_grpc
from vmherd.api.v1.process_pb2 import ProcessEvent
from vmherd.controller.agent_calls import Context, next_request, time_left_s, to_vmherd_error
from vmherd.controller.detached import Detached, page_of
from vmherd.controller.herd import Herd
from vmherd.controller.process_events import ProcessEvents
from vmherd.controller.process_input import Input
from vmherd.controller.process_messages import (
    TextOutput,
    check_command,
    check_signal,
    process_message,
    run_response,
    timeout_s,
)
from vmherd.controller.process_tracker import ProcessTracker
from vmherd.controller.tasks import cancelled, spawn
from vmherd.guest_agent import AgentError, Output, Process, Stream
from vmherd.model.errors import (
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    ResourceExhausted,
    VmherdError,
)

RUN_TIMEOUT_DEFAULT_S = 60.0
WHOLE_OUTPUT_MAX_BYTES = 32 << 20
"""For both streams; as text and as bytes it has to fit into `ANSWER_MAX_BYTES`."""

END_S = 3.0
"""How much of a caller's time is kept for ending a command, so that the caller still hears that its time was up."""

CALLER_TIMEOUT_S = 60.0
"""How long a caller of Exec may take to say what it wants."""

TERMINATE = 15

_log = structlog.get_logger()


class ProcessServicer(process_pb2_grpc.ProcessServiceServicer):
    """See protos/vmherd/api/v1/process.proto."""

    def __init__(self, herd: Herd, detached: Detached) -> None:
        self._herd = herd
        self._detached = detached

    async def Run(self, request: process_pb2.RunRequest, context: Context) -> process_pb2.RunResponse:
        limit_s = timeout_s(request) or RUN_TIMEOUT_DEFAULT_S
        limit_s = min(limit_s, time_left_s(context, limit_s, tidy_up_s=END_S))
        if request.whole_output:
            return await self._run_whole(request, limit_s)
        check_command(request)
        agent = self._herd.find(request.name).open_agent()
        with _agent_errors_told(request.name):
            result = await guest_agent.run(
                agent,
                list(request.command),
                input_data=request.input,
                env=dict(request.environment) or None,
                timeout_s=limit_s,
            )
        return run_response(result)

    async def RunStream(self, request: process_pb2.RunRequest, context: Context) -> AsyncIterator[ProcessEvent]:
        async with (
            self._opened(request, timeout_s(request)) as process,
            contextlib.aclosing(_events(process, request)) as events,
        ):
            async for event in events:
                yield event

    async def Exec(
        self, request_iterator: AsyncIterator[process_pb2.ExecRequest], context: Context
    ) -> AsyncIterator[ProcessEvent]:
        requests = aiter(request_iterator)
        first = await next_request(requests, timeout_s=CALLER_TIMEOUT_S)
        if first is None or first.WhichOneof("part") != "run":
            raise InvalidArgument.of([FieldViolation("run", "is the part that comes first")])
        run = first.run
        async with (
            self._opened(run, timeout_s(run), stdin=first.input_follows) as process,
            _carried_out(requests, process) as acknowledged,
            contextlib.aclosing(_events(process, run)) as events,
            contextlib.aclosing(_merged(events, acknowledged, process)) as merged,
        ):
            async for event in merged:
                yield event

    async def StartProcess(self, request: process_pb2.StartProcessRequest, context: Context) -> process_pb2.Process:
        check_command(request)
        limit_s = timeout_s(request)
        with _agent_errors_told(request.name):
            record = await self._tracker(request).start(
                list(request.command),
                env=dict(request.environment) or None,
                input_data=request.input,
                timeout_s=limit_s,
            )
        return process_message(record)

    async def ListProcesses(
        self, request: process_pb2.ListProcessesRequest, context: Context
    ) -> process_pb2.ListProcessesResponse:
        records = self._tracker(request).records
        page, next_token = page_of(records, size=request.page_size, token=request.page_token)
        return process_pb2.ListProcessesResponse(processes=map(process_message, page), next_page_token=next_token)

    async def GetProcess(self, request: process_pb2.GetProcessRequest, context: Context) -> process_pb2.Process:
        return process_message(self._tracker(request).get(request.id))

    async def FollowProcess(
        self, request: process_pb2.FollowProcessRequest, context: Context
    ) -> AsyncIterator[ProcessEvent]:
        offsets = {Stream.STDOUT: request.stdout_offset, Stream.STDERR: request.stderr_offset}
        if wrong := [FieldViolation(f"{stream}_offset", "is negative") for stream in offsets if offsets[stream] < 0]:
            raise InvalidArgument.of(wrong)
        tracker = self._tracker(request)
        yield ProcessEvent(process=process_message(tracker.get(request.id)))
        pieces = tracker.follow(request.id, offsets, wait=not request.no_wait)
        with _agent_errors_told(request.name):
            async with contextlib.aclosing(_texts(pieces)) as events:
                async for event in events:
                    yield event
        yield ProcessEvent(process=process_message(tracker.get(request.id)))

    async def SignalProcess(self, request: process_pb2.SignalProcessRequest, context: Context) -> process_pb2.Process:
        number = request.signal if request.HasField("signal") else TERMINATE
        check_signal(number)
        with _agent_errors_told(request.name):
            return process_message(await self._tracker(request).signal(request.id, number))

    async def DeleteProcess(self, request: process_pb2.DeleteProcessRequest, context: Context) -> Empty:
        with _agent_errors_told(request.name):
            await self._tracker(request).delete(request.id, force=request.force)
        return Empty()

    def _tracker(self, request: Any) -> ProcessTracker:
        return self._detached.of(self._herd.find(request.name))

    async def _run_whole(self, request: process_pb2.RunRequest, limit_s: float) -> process_pb2.RunResponse:
        whole = {stream: bytearray() for stream in Stream}
        async with self._opened(request, limit_s) as process, contextlib.aclosing(process.output()) as pieces:
            async for piece in pieces:
                whole[piece.stream] += piece.data
                if sum(map(len, whole.values())) > WHOLE_OUTPUT_MAX_BYTES:
                    raise ResourceExhausted(
                        f"{request.command[0]} was ended: it wrote more than the {WHOLE_OUTPUT_MAX_BYTES >> 20} MiB "
                        "that one answer holds; stream its output instead",
                        reason="OUTPUT_TOO_LARGE",
                        metadata={"name": request.name},
                    )
            _check_in_time(process, request, limit_s)
            assert process.result  # noqa: S101  (output comes to its end with the process)
            stdout, stderr = bytes(whole[Stream.STDOUT]), bytes(whole[Stream.STDERR])
            return run_response(replace(process.result, stdout=stdout, stderr=stderr), process.notice)

    @contextlib.asynccontextmanager
    async def _opened(
        self, request: process_pb2.RunRequest, limit_s: float | None, *, stdin: bool = False
    ) -> AsyncIterator[Process]:
        check_command(request)
        agent = self._herd.find(request.name).open_agent()
        process = None
        try:
            with _agent_errors_told(request.name):
                async with guest_agent.open_process(
                    agent,
                    list(request.command),
                    env=dict(request.environment) or None,
                    input_data=request.input,
                    stdin=stdin,
                    timeout_s=limit_s,
                ) as process:
                    yield process
        finally:
            if process and not process.result:
                _log.warning("a command's end was not seen", name=request.name, pid=process.pid)


async def _events(process: Process, request: process_pb2.RunRequest) -> AsyncGenerator[ProcessEvent]:
    limit_s = timeout_s(request)
    events = ProcessEvents(process, request.command, limit_s)
    for event in events.start():
        yield event
    async with contextlib.aclosing(process.output()) as pieces:
        async for piece in pieces:
            for event in events.output(piece):
                yield event
    for event in events.end():
        yield event
    _check_in_time(process, request, limit_s)


async def _merged(
    events: AsyncGenerator[ProcessEvent], others: asyncio.Queue[ProcessEvent], process: Process
) -> AsyncGenerator[ProcessEvent]:
    """The events to their end, and among them the others as they come while the process runs."""
    event, other = asyncio.ensure_future(anext(events, None)), asyncio.ensure_future(others.get())
    try:
        while True:
            await asyncio.wait((event, other), return_when=asyncio.FIRST_COMPLETED)
            if other.done():
                if process.result is None:  # the last event is the process as it ended
                    yield other.result()
                other = asyncio.ensure_future(others.get())
            if event.done():
                if (found := event.result()) is None:
                    return
                yield found
                event = asyncio.ensure_future(anext(events, None))
    finally:
        for task in (event, other):
            await cancelled(task)


async def _texts(pieces: AsyncGenerator[Output]) -> AsyncGenerator[ProcessEvent]:
    text = TextOutput()
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            for event in text.take(piece):
                yield event
    for event in text.rest():
        yield event


@contextlib.asynccontextmanager
async def _carried_out(
    requests: AsyncIterator[process_pb2.ExecRequest], process: Process
) -> AsyncIterator[asyncio.Queue[ProcessEvent]]:
    """Carries out what the caller of Exec asks for while the process runs; gives the events of taken input."""
    data = Input()
    acknowledged: asyncio.Queue[ProcessEvent] = asyncio.Queue()
    tasks = [
        spawn(_listen(requests, process, data), f"requests for process {process.pid}"),
        spawn(_feed(process, data, acknowledged), f"input of process {process.pid}"),
    ]
    try:
        yield acknowledged
    finally:
        for task in tasks:
            await cancelled(task)


async def _listen(requests: AsyncIterator[process_pb2.ExecRequest], process: Process, data: Input) -> None:
    with _told_to(process):
        async for request in requests:
            match request.WhichOneof("part"):
                case "input":
                    await (data.put(request.input) if request.input else data.end())
                case "signal":
                    check_signal(request.signal)
                    await process.signal(request.signal)
                case "end":
                    await process.end()
                case other:
                    raise InvalidArgument.of([FieldViolation(str(other), "comes once, as the first request")])
        await data.end()


async def _feed(process: Process, data: Input, acknowledged: asyncio.Queue[ProcessEvent]) -> None:
    taken_bytes = 0
    with _told_to(process):
        while piece := await data.take():
            await process.write(piece)
            taken_bytes += len(piece)
            acknowledged.put_nowait(ProcessEvent(input_taken=taken_bytes))
        await process.close_input()


@contextlib.contextmanager
def _told_to(process: Process) -> Iterator[None]:
    """Whoever waits for the process's output hears what went wrong beside it."""
    try:
        yield
    except (AgentError, VmherdError) as error:
        process.fail(error)


def _check_in_time(process: Process, request: process_pb2.RunRequest, limit_s: float | None) -> None:
    if process.timed_out:
        raise DeadlineExceeded(
            f"{request.name!r}: {request.command[0]} did not end within {limit_s:g} s and was ended",
            reason="COMMAND_TIMED_OUT",
            metadata={"name": request.name, "pid": process.pid},
        )


@contextlib.contextmanager
def _agent_errors_told(name: str) -> Iterator[None]:
    try:
        yield
    except AgentError as error:
        raise to_vmherd_error(error, name) from error
