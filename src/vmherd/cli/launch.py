"""`vmherd launch` and `plan`, and the networks that they plug instances into."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from vmherd.api.v1.controller_pb2 import LaunchRequest, ListNetworksRequest, PlanRequest
from vmherd.api.v1.instance_pb2 import Hardware, Instance
from vmherd.cli import show
from vmherd.cli.instances import CHANGE_TIMEOUT_S, WAIT_TIMEOUT_S, RequestId, show_started, wait_for
from vmherd.cli.report import to_json
from vmherd.cli.session import ANSWER_TIMEOUT_S, COMPLETION_TIMEOUT_S, Session, Timeout, connected
from vmherd.cli.values import nics, pairs
from vmherd.client import Client, find_controller
from vmherd.model.errors import VmherdError
from vmherd.model.network import NO_NETWORK, USER_NETWORK

UINT32_MAX = 2**32 - 1

app = typer.Typer()


def complete_network(incomplete: str) -> list[str]:
    """The networks whose names start like this, for the shell; the host's only where the controller can be asked."""
    names = [USER_NETWORK, NO_NETWORK]
    try:
        with Client(find_controller()) as client:
            answer = client.instances.ListNetworks(ListNetworksRequest(), timeout=COMPLETION_TIMEOUT_S)
        names = [*(network.name for network in answer.networks), *names]
    except VmherdError:
        pass
    return [name for name in names if name.startswith(incomplete)]


NetworkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        metavar="NAME",
        help="A network interface in this network; may be repeated. `,mac=MAC` and `,address=IPV4` may follow. "
        "`user` is QEMU's own network of one machine, `none` stands for no interface. Default: one, in the first of "
        "`vmherd networks`.",
        autocompletion=complete_network,
    ),
]
ForwardOption = Annotated[
    list[str] | None,
    typer.Option(
        "--forward",
        metavar="PORT",
        help="A port of the guest that a free one of the host's 127.0.0.1 leads to, or one that is named before it: "
        "`22`, `2222:22`, `5353:53/udp`; may be repeated. For `--network user`, which is the default with it.",
    ),
]
Image = Annotated[str, typer.Option("--image", help="What to start from. Default: the built-in guest.")]
Cpus = Annotated[
    int | None, typer.Option("--cpus", metavar="N", min=0, max=UINT32_MAX, help="Virtual CPUs. Default: the image's.")
]
Memory = Annotated[
    int | None,
    typer.Option("--memory", metavar="MIB", min=0, max=UINT32_MAX, help="Memory in MiB. Default: the image's."),
]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label; may be repeated.")]


@app.command(rich_help_panel="Instances")
@connected
def launch(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A DNS label, for instance `web-1`.")],
    *,
    image: Image = "",
    cpus: Cpus = None,
    memory: Memory = None,
    network: NetworkOption = None,
    forward: ForwardOption = None,
    label: Labels = None,
    autostart: Annotated[bool, typer.Option("--autostart", help="Start it whenever the host has booted.")] = False,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Start it.")] = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is ready.")] = True,
    until: Annotated[
        Literal["process", "qmp", "agent", "address"] | None,
        typer.Option("--until", help="What ready means. Default: address, or agent where it has no network."),
    ] = None,
    timeout: Timeout = WAIT_TIMEOUT_S,
    request_id: RequestId = "",
) -> None:
    """Makes an instance from an image and starts it."""
    request = _request(name, image=image, cpus=cpus, memory=memory, label=label, network=network, forward=forward)
    request.autostart = autostart
    request.start = start
    request.request_id = request_id
    instance = session.client.instances.Launch(request, timeout=CHANGE_TIMEOUT_S)
    if start and wait and instance.state != Instance.FAILED:
        try:
            instance = wait_for(session, name, until or ("address" if network != [NO_NETWORK] else "agent"), timeout)
        except KeyboardInterrupt:
            print(f"vmherd: no longer waiting; {name} goes on starting", file=sys.stderr)
            raise
    show_started(session, instance)


@app.command(rich_help_panel="Instances")
@connected
def plan(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A DNS label, for instance `web-1`.")],
    *,
    image: Image = "",
    cpus: Cpus = None,
    memory: Memory = None,
    network: NetworkOption = None,
    forward: ForwardOption = None,
    label: Labels = None,
) -> None:
    """Shows what a launch would run and which network devices and rules it would make, and does nothing."""
    request = PlanRequest(
        launch=_request(name, image=image, cpus=cpus, memory=memory, label=label, network=network, forward=forward)
    )
    answer = session.client.instances.Plan(request, timeout=CHANGE_TIMEOUT_S)
    print(to_json(answer) if session.as_json else show.plan_text(answer))


@app.command(rich_help_panel="Instances")
@connected
def networks(session: Session) -> None:
    """Lists the host's networks, the default of a launch first."""
    answer = session.client.instances.ListNetworks(ListNetworksRequest(), timeout=ANSWER_TIMEOUT_S)
    if session.as_json:
        print(to_json(answer))
    elif answer.networks:
        show.open_console().print(show.network_table(answer.networks))
    elif sys.stdout.isatty():
        print("no networks of the host; instances are on QEMU's own, `user`", file=sys.stderr)


def _request(
    name: str,
    *,
    image: str,
    cpus: int | None,
    memory: int | None,
    label: list[str] | None,
    network: list[str] | None,
    forward: list[str] | None,
) -> LaunchRequest:
    """The request; a value that was not given is not in it either."""
    return LaunchRequest(
        name=name,
        image=image,
        hardware=None if cpus is None and memory is None else Hardware(cpus=cpus, memory_mib=memory),
        labels=pairs(label or [], "--label"),
        nics=nics(network or [], forward or []),
    )
