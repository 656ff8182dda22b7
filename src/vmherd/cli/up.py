"""`vmherd up`: keeps the three processes running in the foreground."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from vmherd.api.v1.controller_pb2 import StopRequest
from vmherd.api.v1.instance_pb2 import Instance
from vmherd.cli import show
from vmherd.cli.herd_files import (
    Flags,
    HerdSettings,
    check_usable,
    ignored_flags,
    own_directory,
    prepare,
    settings_file,
    settings_in,
)
from vmherd.cli.instances import STOP_TIMEOUT_S, is_active
from vmherd.cli.processes import ProcessEnded, Processes, race, running
from vmherd.cli.report import tell
from vmherd.client import Client, named_run_directory, own_run_directory, own_state_directory
from vmherd.model.errors import Aborted, VmherdError
from vmherd.model.layout import Herd, StateDirectory
from vmherd.rpc.serving import until_signalled

AS_ROOT = (
    "All three run as root, and each QEMU as a user of its own.",
    "The units in packaging/systemd leave root to the helper alone.",
)

app = typer.Typer()


@app.command(rich_help_panel="Processes")
def up(
    ctx: typer.Context,
    *,
    rundir: Annotated[
        Path | None,
        typer.Option(
            "--rundir",
            metavar="DIR",
            help="Keep sockets, settings, token and logs in DIR, and the state in DIR/state. "
            "Default: $VMHERD_RUNDIR, or else /run/vmherd and /var/lib/vmherd for root, "
            "$XDG_RUNTIME_DIR/vmherd and ~/.local/state/vmherd for others.",
        ),
    ] = None,
    http: Annotated[
        str | None, typer.Option("--http", metavar="HOST:PORT", help="Serve HTTP there. Default: 127.0.0.1:8080.")
    ] = None,
    grpc: Annotated[
        str | None,
        typer.Option("--grpc", metavar="HOST:PORT", help="Serve gRPC there too, with the token. Default: off."),
    ] = None,
    subnet: Annotated[
        str | None,
        typer.Option(
            "--subnet",
            metavar="CIDR",
            help="Make a network `default` with NAT, DHCP and DNS on this IPv4 subnet. For root. Default: off.",
        ),
    ] = None,
    bridge: Annotated[
        str | None,
        typer.Option(
            "--bridge",
            metavar="NAME",
            help="With --subnet: the bridge to make, vmherd0 by default. Alone: an existing bridge, with somebody "
            "else's addresses, as network `default`. For root.",
        ),
    ] = None,
    accelerator: Annotated[
        Literal["auto", "kvm", "tcg"] | None,
        typer.Option("--accelerator", help="What runs the guests. Default: auto, the faster as measured."),
    ] = None,
    stop_instances: Annotated[
        bool, typer.Option("--stop-instances", help="At the end, stop every instance; otherwise they run on.")
    ] = False,
) -> None:
    """Keeps the helper, the controller and the gateway running in the foreground.

    Writes the settings files into DIR/settings where they are missing; those that are there win over the options.
    Ctrl-C or SIGTERM ends the three.
    """
    rundir = rundir or ctx.find_root().params.get("rundir") or named_run_directory()
    herd = Herd(rundir.resolve() if rundir else own_run_directory())
    state_dir = herd.path / "state" if rundir else own_state_directory()
    asyncio.run(_up(herd, state_dir, Flags(http, grpc, accelerator, bridge, subnet), stop_instances=stop_instances))


async def _up(herd: Herd, state_dir: Path, flags: Flags, *, stop_instances: bool) -> None:
    try:
        await race(until_signalled(), _keep_up(herd, state_dir, flags, stop_instances=stop_instances))
    except ProcessEnded as error:
        tell(error)
        print(*error.tail, sep="\n", file=sys.stderr)
        raise typer.Exit(1) from error


async def _keep_up(herd: Herd, state_dir: Path, flags: Flags, *, stop_instances: bool) -> None:
    async with herd_up(herd, state_dir, flags) as (processes, settings):
        instances = await asyncio.to_thread(_instances, herd)
        print(*_welcome(herd, processes, settings, instances), sep="\n", flush=True)
        try:
            await processes.until_one_ends()
        finally:
            if stop_instances:
                await _stop_all(herd)
            print("ending the three processes", flush=True)


@asynccontextmanager
async def herd_up(herd: Herd, state_dir: Path, flags: Flags) -> AsyncIterator[tuple[Processes, HerdSettings]]:
    """The three processes in this run directory, ready, with the built-in guest; gone when the context is left.

    Raises:
        VmherdError: what is wrong with the flags, the directory, a settings file or a process.
    """
    with own_directory(herd.path):
        settings = settings_in(herd, state_dir, flags)
        for line in ignored_flags(herd, flags, settings):
            print(f"vmherd: {line}", file=sys.stderr)
        check_usable(herd, settings)
        prepare(herd, state_dir, flags)
        await _build_builtin(StateDirectory(Path(settings.controller.state_dir)).images)
        async with running(herd) as processes:
            yield processes, settings


async def _build_builtin(images: Path) -> None:
    """Makes the built-in guest where it is missing or out of date, in a process that can be ended at any moment."""
    print("preparing the built-in guest …", flush=True)
    builder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "vmherd.image.builtin", "--images-dir", str(images)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, errors = await builder.communicate()
    finally:
        if builder.returncode is None:
            os.killpg(builder.pid, signal.SIGTERM)
            await builder.wait()
    if builder.returncode:
        raise Aborted(errors.decode(errors="replace"), reason="BUILD_FAILED")


def _instances(herd: Herd) -> list[Instance]:
    with Client(herd.controller_socket) as client:
        return [instance for page in client.pages() for instance in page.instances]


def _welcome(herd: Herd, processes: Processes, settings: HerdSettings, instances: list[Instance]) -> list[str]:
    program = "vmherd" if shutil.which("vmherd") else str(Path(sys.executable).with_name("vmherd"))
    active = sum(is_active(instance) for instance in instances)
    networks = settings.qemu.networks
    return [
        f"vmherd is up in {herd.path}",
        f"  HTTP       http://{processes.http} (the API's page: http://{processes.http}/docs)",
        f"  gRPC       unix:{herd.controller_socket}",
        *([f"             {settings.controller.listen_tcp}"] if settings.controller.listen_tcp else []),
        f"  token      {herd.token}",
        *(f"  network    {it.name}: {it.subnet or 'addresses of others'}, on bridge {it.bridge}" for it in networks),
        f"  instances  {len(instances)}, {active} of them running" if instances else "  instances  none yet",
        "",
        f'  curl -H "Authorization: Bearer $(cat {shlex.quote(str(herd.token))})" http://{processes.http}/v1/instances',
        f"  {program} --rundir {shlex.quote(str(herd.path))} list",
        "",
        *(AS_ROOT if os.getuid() == 0 else ()),
        *(
            f"{it.bridge} stays; `{program} qemu --settings {settings_file(herd, 'qemu')} --teardown` removes it."
            for it in networks
            if it.subnet
        ),
        "Ctrl-C ends the three processes.",
    ]


async def _stop_all(herd: Herd) -> None:
    def stop(client: Client, name: str) -> None:
        try:
            instance = client.instances.Stop(StopRequest(name=name), timeout=STOP_TIMEOUT_S)
            print(show.summary(instance), flush=True)
        except VmherdError as error:
            tell(error)

    try:
        names = [instance.name for instance in await asyncio.to_thread(_instances, herd) if is_active(instance)]
    except VmherdError as error:
        tell(error)
        return
    if names:
        print(f"stopping {', '.join(names)}", flush=True)
    with Client(herd.controller_socket) as client:
        await asyncio.gather(*(asyncio.to_thread(stop, client, name) for name in names))
