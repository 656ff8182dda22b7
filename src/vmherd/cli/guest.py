"""`vmherd exec`: what goes through the guest agent."""

from __future__ import annotations

import sys
from typing import Annotated, TextIO

import typer

from vmherd.api.v1.process_pb2 import RunRequest
from vmherd.cli.report import to_json
from vmherd.cli.session import MARGIN_S, Name, Session, Timeout, connected
from vmherd.cli.values import duration, pairs

RUN_TIMEOUT_S = 60.0
"""The controller's default as well."""

app = typer.Typer()


@app.command("exec", rich_help_panel="Guests")
@connected
def exec_(
    session: Session,
    name: Name,
    *,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The command's words; no shell.")],
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="KEY=VALUE", help="An environment variable; may be repeated.")
    ] = None,
    input_: Annotated[
        typer.FileBinaryRead | None, typer.Option("--input", metavar="FILE", help="Its standard input; `-` is ours.")
    ] = None,
    timeout: Timeout = RUN_TIMEOUT_S,
) -> None:
    """Runs a command in a guest, prints its output and exits with its code."""
    request = RunRequest(
        name=name,
        command=command,
        environment=pairs(env or [], "--env"),
        input=input_.read() if input_ else b"",
        timeout=duration(timeout),
    )
    answer = session.client.processes.Run(request, timeout=timeout + MARGIN_S)
    if session.as_json:
        print(to_json(answer))
    else:
        _write(sys.stdout, answer.stdout_raw if answer.HasField("stdout_raw") else answer.stdout.encode())
        _write(sys.stderr, answer.stderr_raw if answer.HasField("stderr_raw") else answer.stderr.encode())
        if answer.stdout_truncated or answer.stderr_truncated:
            print("vmherd: the guest agent keeps 16 MiB of each output; there was more", file=sys.stderr)
    raise typer.Exit(answer.exit_code)


def _write(stream: TextIO, output: bytes) -> None:
    stream.buffer.write(output)
    stream.flush()
