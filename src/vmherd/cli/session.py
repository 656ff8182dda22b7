"""What every command that asks the controller shares: the connection, `--rundir` and `--json`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Concatenate

import typer

from vmherd.api.v1.controller_pb2 import ListRequest
from vmherd.cli.exit_codes import exit_code
from vmherd.cli.report import tell
from vmherd.client import Client, find_controller
from vmherd.model.errors import VmherdError

ANSWER_TIMEOUT_S = 10.0
"""For what the controller answers from memory."""
MARGIN_S = 10.0
"""How much longer than the controller's own deadline ours is, so that its error, which says more, comes first."""
COMPLETION_TIMEOUT_S = 1.0

RunDir = Annotated[
    Path | None,
    typer.Option(
        "--rundir",
        metavar="DIR",
        readable=False,  # who may connect to a socket in it need not be able to list it
        help="The run directory. Default: $VMHERD_RUNDIR, or the first of the usual ones with a controller in it.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: one document, or one a line where more may come.")]


def complete_name(incomplete: str) -> list[str]:
    """The instances whose names start like this, for the shell; none where the controller cannot be asked."""
    try:
        with Client(find_controller()) as client:
            instances = client.instances.List(ListRequest(page_size=1000), timeout=COMPLETION_TIMEOUT_S).instances
    except VmherdError:
        return []
    return [instance.name for instance in instances if instance.name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="The instance.", autocompletion=complete_name)]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="The instances.", autocompletion=complete_name)]
DAY_S = 86_400.0
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="S", min=0, max=DAY_S, help="How many seconds to wait at most.")
]


@dataclass(frozen=True)
class Session:
    """A connection to the controller, and how its answers are to be printed."""

    client: Client
    as_json: bool


def connected(command: Callable[Concatenate[Session, ...], None]) -> Callable[..., None]:
    """Makes a command of a function that wants a session: adds `--rundir` and `--json`, and tells its errors."""

    @functools.wraps(command)
    def run(*, ctx: typer.Context, rundir: Path | None, as_json: bool, **arguments: object) -> None:
        try:
            with Client(find_controller(rundir or ctx.find_root().params.get("rundir"))) as client:
                command(Session(client, as_json), **arguments)
        except VmherdError as error:
            tell(error, as_json=as_json)
            raise typer.Exit(exit_code(error)) from error

    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        inspect.Parameter("rundir", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=RunDir),
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
