"""`vmherd agent`: the guest agent on any socket, also of VMs that vmherd did not start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from vmherd.cli import copying
from vmherd.cli.agent_errors import explained
from vmherd.cli.agent_files import AgentFiles
from vmherd.cli.attending import Command, Env, NoStdin, OwnInput, Timeout, own_input
from vmherd.cli.copy import report
from vmherd.cli.exit_codes import exit_code
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
from vmherd.cli.report import tell
from vmherd.cli.session import COMPLETION_TIMEOUT_S, DAY_S, AsJson
from vmherd.cli.values import pairs
from vmherd.guest_agent import AgentError, GuestAgent
from vmherd.guest_agent.address import Address, UnixAddress, parse_address
from vmherd.guest_agent.proxy import MAX_CLIENTS, SILENCE_S, SILENT_COMMANDS, Proxy, listening
from vmherd.model.errors import FailedPrecondition, InvalidArgument, VmherdError
from vmherd.rpc.serving import until_signalled

T = TypeVar("T")

SOCKET_VARIABLE = "VMHERD_AGENT_SOCKET"
CALL_TIMEOUT_S = 10.0
SHARED_CALL_TIMEOUT_S = 60.0

RAW_CALL = "call"

Socket = Annotated[
    str | None,
    typer.Option(
        "--socket",
        metavar="ADDRESS",
        help=f"The agent's socket: a unix socket's path, or tcp:HOST:PORT. Default: ${SOCKET_VARIABLE}.",
    ),
]
CallTimeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="S",
        min=0.001,
        max=DAY_S,
        help=f"How many seconds a call may take. Default: {CALL_TIMEOUT_S:g}, with --listen {SHARED_CALL_TIMEOUT_S:g}.",
    ),
]


class AgentCommands(TyperGroup):
    """The commands that have a command line of their own; every other name is a raw call of the agent's command."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name."""
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, RAW_CALL)

    def list_commands(self, ctx: Any) -> list[str]:
        """For the help those that it can explain, for the shell also all that this agent has."""
        own = [name for name in super().list_commands(ctx) if name != RAW_CALL]
        return [*own, *spellings(_names_to_complete(ctx.params.get("socket")))] if ctx.resilient_parsing else own

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """What may stand here; the long spelling of a command only once it was begun."""
        return [item for item in super().shell_complete(ctx, incomplete) if incomplete or is_short(item.value)]


agent_commands = typer.Typer(cls=AgentCommands, subcommand_metavar="[COMMAND] [ARGUMENTS]...")
app = typer.Typer()
app.add_typer(agent_commands, name="agent", rich_help_panel="Guests")


@dataclass(frozen=True)
class AgentOnSocket:
    """An agent at a socket, and how its answers are to be printed."""

    named: str | None
    timeout_s: float | None
    as_json: bool

    def ask(self, work: Callable[[GuestAgent], Awaitable[T]]) -> T:
        """What the work with the agent gives.

        Raises:
            VmherdError: the agent did not do it, with a hint why.
        """

        async def connected() -> T:
            async with GuestAgent(address) as agent:
                return await work(agent)

        address = self.address
        with _explained(address):
            return asyncio.run(connected())

    @contextlib.contextmanager
    def files(self) -> Iterator[AgentFiles]:
        """The guest's files."""
        agent = GuestAgent(self.address)
        with asyncio.Runner() as runner:
            try:
                yield AgentFiles(runner, agent, self.address)
            finally:
                runner.run(agent.close())

    @property
    def address(self) -> Address:
        """Where the agent is. Raises `InvalidArgument` if that was not said, or not well."""
        named = self.named or os.environ.get(SOCKET_VARIABLE)
        if not named:
            raise InvalidArgument(f"name the agent's socket with --socket or ${SOCKET_VARIABLE}")
        try:
            return parse_address(named)
        except ValueError as error:
            raise InvalidArgument(f"--socket: {error}") from error


@contextlib.contextmanager
def _explained(address: Address) -> Iterator[None]:
    try:
        yield
    except AgentError as error:
        raise explained(error, address) from error
    except ValueError as error:  # arguments that the agent is not asked for, for instance too large a count
        raise InvalidArgument(str(error)) from error


@contextlib.contextmanager
def told(*, as_json: bool) -> Iterator[None]:
    """Ends the program with the error's exit code where one is raised, and tells it."""
    try:
        yield
    except VmherdError as error:
        tell(error, as_json=as_json)
        raise typer.Exit(exit_code(error)) from error


@agent_commands.callback(invoke_without_command=True)
def agent(
    ctx: typer.Context,
    *,
    socket: Socket = None,
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="PATH", help="Share the agent: serve its protocol to several clients here."),
    ] = None,
    max_clients: Annotated[
        int, typer.Option("--max-clients", metavar="N", min=1, help="How many clients may share the agent.")
    ] = MAX_CLIENTS,
    timeout: CallTimeout = None,
    as_json: AsJson = False,
) -> None:
    """Talks to the guest agent on any socket, whoever started the VM.

    COMMAND is one of the agent's, with or without `guest-`; without COMMAND this lists those that the agent has. Its
    arguments are one JSON object or words KEY=VALUE.
    """
    ctx.obj = found = AgentOnSocket(socket, timeout, as_json)
    with told(as_json=as_json):
        if listen and ctx.invoked_subcommand:
            raise InvalidArgument("--listen shares the agent and takes no command")
        if listen:
            _share(found, listen, max_clients)
        elif ctx.invoked_subcommand is None:
            _list(found)


def _found(ctx: typer.Context, socket: str | None, *, as_json: bool) -> AgentOnSocket:
    """What was said before the command, and after it."""
    before: AgentOnSocket = ctx.obj
    return replace(before, named=socket or before.named, as_json=as_json or before.as_json)


@agent_commands.command(RAW_CALL)
def call(
    ctx: typer.Context,
    words: Words = None,
    *,
    socket: Socket = None,
    timeout: CallTimeout = None,
    as_json: AsJson = False,
) -> None:
    """Calls this command of the agent and prints its result as JSON."""
    found = _found(ctx, socket, as_json=as_json)
    command = full_name(str(ctx.info_name))
    timeout_s = timeout or found.timeout_s or CALL_TIMEOUT_S
    with told(as_json=found.as_json):
        typed = arguments(words or [])
        if command in SILENT_COMMANDS:
            found.ask(lambda agent: agent.send(command, typed, timeout_s=min(timeout_s, SILENCE_S)))
            print(f"vmherd: sent; an agent answers {command} only if it fails", file=sys.stderr)
        else:
            print_result(
                found.ask(lambda agent: agent.execute(command, typed, timeout_s=timeout_s)), as_json=found.as_json
            )


@agent_commands.command("exec")
def exec_(
    ctx: typer.Context,
    *,
    command: Command,
    env: Env = None,
    no_stdin: NoStdin = False,
    timeout: Timeout = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Runs a command in the guest with our standard input and output, and exits with its code; see `vmherd exec`."""
    from vmherd.cli.agent_exec import execute  # noqa: PLC0415  (other commands need none of the controller)

    found = _found(ctx, socket, as_json=as_json)
    own = OwnInput() if no_stdin else own_input()
    environment, limit_s = pairs(env or [], "--env"), timeout or found.timeout_s
    with told(as_json=found.as_json):
        code = found.ask(
            lambda agent: execute(agent, command, own, env=environment, timeout_s=limit_s, as_json=found.as_json)
        )
    raise typer.Exit(code)


@agent_commands.command("cp")
def cp(
    ctx: typer.Context,
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="`:/path` in the guest, a path here, or `-`.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where it goes, in the same forms.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Copy a folder and all that is in it.")] = False,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Copies a file or a folder out of the guest or into it; see `vmherd cp`."""
    found = _found(ctx, socket, as_json=as_json)
    with told(as_json=found.as_json):
        places = copying.place(source), copying.place(target)
        if [place.is_guest for place in places].count(True) != 1 or any(place.guest for place in places):
            raise InvalidArgument("one of SOURCE and TARGET has to be in the guest, as :/path, and the other one here")
        with found.files() as files:
            copied = copying.copy(*places, files, recursive=recursive)
        report(copied, as_json=found.as_json, to=sys.stderr if target == copying.STDIO else sys.stdout)


def _list(found: AgentOnSocket) -> None:
    timeout_s = found.timeout_s or CALL_TIMEOUT_S
    if found.as_json:
        print_result(found.ask(lambda agent: agent.execute("guest-info", timeout_s=timeout_s)), as_json=True)
    else:
        print_commands(found.ask(lambda agent: agent.info(timeout_s=timeout_s)))


def _share(found: AgentOnSocket, listen: str, max_clients: int) -> None:
    address = found.address
    try:
        shared = parse_address(listen)
    except ValueError as error:
        raise InvalidArgument(f"--listen: {error}") from error
    if not isinstance(shared, UnixAddress):
        raise InvalidArgument(f"--listen takes the path of a unix socket, and no port, which has no owner: {listen}")
    path = Path(shared.path)
    if isinstance(address, UnixAddress) and os.path.realpath(address.path) == os.path.realpath(path):
        raise InvalidArgument(f"--listen is the agent's own socket, {path}; choose another path")

    async def serve() -> None:
        with listening(path) as listener:
            proxy = Proxy(address, timeout_s=found.timeout_s or SHARED_CALL_TIMEOUT_S, max_clients=max_clients)
            serving = asyncio.create_task(proxy.serve(listener))
            signalled = asyncio.create_task(until_signalled())
            await asyncio.sleep(0)  # both have begun
            print(f"vmherd: clients of {address} may connect to {path}", file=sys.stderr, flush=True)
            await asyncio.wait((serving, signalled), return_when=asyncio.FIRST_COMPLETED)
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    try:
        asyncio.run(serve())
    except OSError as error:
        raise FailedPrecondition(
            f"cannot listen on {path}: {error.strerror or error}; choose another path, in a directory of yours",
            reason="SOCKET_NOT_AVAILABLE",
        ) from error


def _names_to_complete(socket: str | None) -> list[str]:
    """The names of this agent's commands, or those that vmherd knows if it does not say."""
    found = AgentOnSocket(socket, COMPLETION_TIMEOUT_S, as_json=False)
    try:
        return list(found.ask(lambda agent: agent.info(timeout_s=COMPLETION_TIMEOUT_S)).commands)
    except VmherdError:
        return known_names()
