"""`vmherd guest`: raw calls of an instance's guest agent."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated

import typer

from vmherd.api.v1.guest_pb2 import GuestExecuteRequest, GuestInfoRequest, GuestInfoResponse
from vmherd.cli.raw_calls import (
    Words,
    arguments,
    full_name,
    is_short,
    known_names,
    print_commands,
    print_result,
    spellings,
)
from vmherd.cli.session import COMPLETION_TIMEOUT_S, DAY_S, Name, Session, connected
from vmherd.client import Client, find_controller
from vmherd.guest_agent import AgentInfo, CommandInfo
from vmherd.model.errors import VmherdError

app = typer.Typer()


def _complete_command(ctx: typer.Context, incomplete: str) -> list[str]:
    """The agent's commands that start like this, for the shell, or those that vmherd knows if it does not say."""
    names = known_names()
    with suppress(VmherdError), Client(find_controller(ctx.find_root().params.get("rundir"))) as client:
        info = client.guest.Info(GuestInfoRequest(name=ctx.params["name"]), timeout=COMPLETION_TIMEOUT_S)
        names = [command.name for command in info.supported_commands]
    return [name for name in spellings(names) if name.startswith(incomplete) and (incomplete or is_short(name))]


@app.command("guest", rich_help_panel="Guests")
@connected
def guest(
    session: Session,
    name: Name,
    command: Annotated[
        str | None,
        typer.Argument(
            metavar="COMMAND", help="A command, with or without `guest-`.", autocompletion=_complete_command
        ),
    ] = None,
    words: Words = None,
    *,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="S", min=0, max=DAY_S, help="How many seconds it may take. Default: the controller's."
        ),
    ] = None,
) -> None:
    """Calls a command of a guest's agent and prints its result as JSON; without one, lists what the agent has."""
    if command is None and not session.as_json:
        print_commands(_to_info(session.client.guest.Info(GuestInfoRequest(name=name), timeout=timeout)))
        return
    request = GuestExecuteRequest(
        name=name, command=full_name(command or "info"), arguments_json=json.dumps(arguments(words or []))
    )
    answer = session.client.guest.Execute(request, timeout=timeout)
    print_result(json.loads(answer.result_json), as_json=session.as_json)


def _to_info(message: GuestInfoResponse) -> AgentInfo:
    return AgentInfo(
        version=message.version,
        commands={
            command.name: CommandInfo(enabled=command.enabled, success_response=command.success_response)
            for command in message.supported_commands
        },
    )
