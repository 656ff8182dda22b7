"""`vmherd ps` and `vmherd process`: commands that run in guests on their own."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from vmherd.api.v1.process_pb2 import (
    DeleteProcessRequest,
    FollowProcessRequest,
    ListProcessesRequest,
    Process,
    SignalProcessRequest,
)
from vmherd.cli.attending import show
from vmherd.cli.exec import output_of, print_event, print_notice
from vmherd.cli.report import printable, to_json
from vmherd.cli.session import Name, Session, connected
from vmherd.cli.show import age, open_console
from vmherd.cli.values import signal_number

CALL_TIMEOUT_S = 60.0
PAGE_SIZE = 100

app = typer.Typer()
group = typer.Typer(name="process", help="Commands that run in guests on their own, started by `vmherd exec --detach`.")
app.add_typer(group, rich_help_panel="Guests")

Id = Annotated[str, typer.Argument(metavar="ID", help="The process's id, as `vmherd ps` shows it.")]


@group.command("list")
@app.command("ps", rich_help_panel="Guests")
@connected
def ps(session: Session, name: Name) -> None:
    """Lists the commands that run in a guest on their own, and those that have ended."""
    found = _processes(session, name)
    if session.as_json:
        for process in found:
            print(to_json(process))
    else:
        open_console().print(process_table(found, datetime.now(UTC)))


@group.command()
@connected
def follow(
    session: Session,
    name: Name,
    process_id: Id,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="End at what there is now.")] = False,
) -> None:
    """Shows all output of a command until it ends, and exits with its code. Ctrl-C leaves it running."""
    process = Process()
    request = FollowProcessRequest(name=name, id=process_id, no_wait=no_wait)
    for event in session.client.processes.FollowProcess(request):
        if event.HasField("process"):
            process = event.process
        if session.as_json:
            print_event(event)
        elif output := output_of(event):
            show(output)
        else:
            print_notice(event)
    if process.reason:
        typer.echo(f"vmherd: process {process_id} {state_name(process)}: {printable(process.reason)}", err=True)
    raise typer.Exit(process.exit_code if process.state != Process.LOST else 1)


@group.command()
@connected
def kill(
    session: Session,
    name: Name,
    process_id: Id,
    signal: Annotated[str, typer.Option("--signal", "-s", metavar="SIGNAL", help="Its name or number.")] = "TERM",
) -> None:
    """Sends a command, and what it has started, a signal."""
    request = SignalProcessRequest(name=name, id=process_id, signal=signal_number(signal, "--signal"))
    process = session.client.processes.SignalProcess(request, timeout=CALL_TIMEOUT_S)
    if session.as_json:
        print(to_json(process))


@group.command()
@connected
def delete(
    session: Session,
    name: Name,
    process_id: Id,
    force: Annotated[bool, typer.Option("--force", help="End it first if it runs.")] = False,
) -> None:
    """Forgets a command and removes its output from the guest."""
    request = DeleteProcessRequest(name=name, id=process_id, force=force)
    session.client.processes.DeleteProcess(request, timeout=CALL_TIMEOUT_S)


def process_table(processes: Iterable[Process], now: datetime) -> Table:
    """One line for each process."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("ID", "STATE", "PID", "AGE", "COMMAND"):
        table.add_column(heading, no_wrap=heading != "COMMAND")
    for process in processes:
        table.add_row(
            printable(process.id),
            state_name(process),
            str(process.pid),
            age((now - process.start_time.ToDatetime(UTC)).total_seconds()),
            printable(shlex.join(process.command)),
        )
    return table


def state_name(process: Process) -> str:
    """The state in lower case, with the exit code where there is one."""
    name = Process.State.Name(process.state).lower()
    return f"{name} ({process.exit_code})" if process.HasField("exit_code") else name


def _processes(session: Session, name: str) -> Iterator[Process]:
    request = ListProcessesRequest(name=name, page_size=PAGE_SIZE)
    while True:
        page = session.client.processes.ListProcesses(request, timeout=CALL_TIMEOUT_S)
        yield from page.processes
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
