"""The commands for people and scripts, put together."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from vmherd.cli import agent, copy, demo, exec, guest_calls, guest_processes, instances, launch, up
from vmherd.cli.exit_codes import MEANINGS, USAGE, exit_code
from vmherd.cli.report import printable, tell
from vmherd.cli.serve import PROCESSES, serve
from vmherd.cli.session import RunDir
from vmherd.model.errors import InvalidArgument, VmherdError


class Commands(TyperGroup):
    """The commands; one that fails leaves one line on standard error and one of the documented exit codes."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Runs the command that the arguments name, and exits."""
        try:
            _check_arguments(sys.argv[1:])
            code = super().main(*args, **(extra | {"standalone_mode": False}))
        except VmherdError as error:
            tell(error)
            code = exit_code(error)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "vmherd"
            # Others take `exec NAME uname -a`; here the options before `--` are ours.
            hint = "; put `--` before the command" if path.endswith(" exec") else ""
            print(f"vmherd: {printable(error.format_message())}{hint} (see `{path} --help`)", file=sys.stderr)
            code = USAGE
        sys.exit(code or 0)


app = typer.Typer(
    name="vmherd",
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    epilog="\n".join(("Exit codes:", *(f"{code:>3}  {meaning}" for code, meaning in MEANINGS.items()))),
)


@app.callback()
def root(ctx: typer.Context, rundir: RunDir = None) -> None:
    """Runs QEMU virtual machines and talks to their guest agents."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(USAGE)


def _check_arguments(words: list[str]) -> None:
    """Refuses bytes that are no UTF-8, which no request can carry."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"not UTF-8: {word!a}") from None


def _process(ctx: typer.Context) -> None:
    raise typer.Exit(serve(str(ctx.info_name), ctx.args))


processes = typer.Typer()
for name, process in PROCESSES.items():
    processes.command(
        name,
        help=process.__doc__,
        rich_help_panel="Processes",
        add_help_option=False,  # its own parser has one
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_process)

for part in (
    launch.app,
    instances.app,
    exec.app,
    guest_processes.app,
    guest_calls.app,
    copy.app,
    agent.app,
    up.app,
    demo.app,
    processes,
):
    app.add_typer(part)
