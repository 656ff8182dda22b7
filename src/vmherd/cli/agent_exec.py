"""`vmherd agent … exec`: a program in a guest whose agent is on a socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmherd.cli.attending import OwnInput, attend, show
from vmherd.cli.exec import print_event, print_notice
from vmherd.controller.process_events import ProcessEvents
from vmherd.controller.process_messages import exit_code_of
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
    async with open_process(
        agent,
        command,
        env=env or None,
        input_data=own.data if own.descriptor is None else b"",
        stdin=own.descriptor is not None,
        timeout_s=timeout_s,
    ) as process:
        events = ProcessEvents(process, command, timeout_s)

        def show_events(output: Output) -> None:
            for event in events.output(output):
                print_event(event)

        for event in events.start():
            tell(event)
        interruption = await attend(process, own, show_events if as_json else show)
    for event in events.end():
        tell(event)
    if interruption is not None:
        return 128 + interruption
    if process.timed_out:
        message = f"{command[0]} did not end within {timeout_s:g} s and was ended"
        raise DeadlineExceeded(message, reason="COMMAND_TIMED_OUT")
    result = process.result
    assert result  # noqa: S101  (output comes to its end with the process)
    return exit_code_of(result)
