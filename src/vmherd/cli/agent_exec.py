"""`vmherd agent … exec`: a program in a guest whose agent is on a socket."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vmherd.api.v1.process_pb2 import ProcessEvent
from vmherd.cli.attending import OwnInput, attend, show
from vmherd.cli.exec import print_event, print_notice
from vmherd.controller.process_messages import TextOutput, exit_code_of, process_message
from vmherd.controller.process_records import ProcessRecord, ProcessState
from vmherd.guest_agent import GuestAgent, Output, open_process
from vmherd.model.errors import DeadlineExceeded


async def execute(
    agent: GuestAgent,
    command: Sequence[str],
    own: OwnInput,
    *,
    env: Mapping[str, str] | None,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Runs a program with our input and output, or its events in JSON, and gives the exit code for us.

    Raises:
        AgentError: it was not started, or its end was not seen.
        DeadlineExceeded: its time was up.
    """
    tell = print_event if as_json else print_notice
    text = TextOutput()

    def show_events(output: Output) -> None:
        for event in text.take(output):
            print_event(event)

    async with open_process(
        agent,
        command,
        env=env or None,
        input_data=own.data if own.descriptor is None else b"",
        stdin=own.descriptor is not None,
        timeout_s=timeout_s,
    ) as process:
        record = ProcessRecord(
            uid="", id="", command=tuple(command), started_at_s=time.time(), generation=0, pid=process.pid
        )
        tell(ProcessEvent(process=process_message(record)))
        if process.notice:
            tell(ProcessEvent(notice=process.notice))
        interruption = await attend(process, own, show_events if as_json else show)
    for event in text.rest():
        print_event(event)
    if interruption is not None:
        return 128 + interruption
    result = process.result
    assert result  # noqa: S101  (output comes to its end with the process)
    if result.stdout_truncated or result.stderr_truncated:
        tell(ProcessEvent(notice="the guest agent keeps 16 MiB of each output; there was more"))
    late = f"its time of {timeout_s:g} s was up" if process.timed_out else ""
    ended = replace(
        record,
        state=ProcessState.EXITED,
        ended_at_s=time.time(),
        exit_code=exit_code_of(result),
        signal=result.signal,
        reason=late,
    )
    tell(ProcessEvent(process=process_message(ended)))
    if late:
        raise DeadlineExceeded(f"{command[0]}: {late}, and it was ended", reason="COMMAND_TIMED_OUT")
    return exit_code_of(result)
