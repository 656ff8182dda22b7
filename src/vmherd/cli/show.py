"""How instances look on a terminal: pure functions from messages to what rich prints.

Much of what is shown comes from a guest, so none of it is read as markup and no control character gets through.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TextIO

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vmherd.api.v1.controller_pb2 import Network, PlanResponse, WaitResponse, WatchResponse
from vmherd.api.v1.instance_pb2 import Address, Exit, Instance, Nic, PortForward, Readiness
from vmherd.cli.report import printable

STATE_STYLES = {
    Instance.RUNNING: "green",
    Instance.STARTING: "cyan",
    Instance.STOPPING: "cyan",
    Instance.PAUSED: "yellow",
    Instance.SUSPENDED: "yellow",
    Instance.FAILED: "bold red",
    Instance.UNKNOWN: "magenta",
}

STOP_STEPS = {
    Exit.AGENT: "by the guest agent's shutdown",
    Exit.POWER_BUTTON: "by the power button",
    Exit.QUIT: "by telling QEMU to quit",
    Exit.KILL: "by killing QEMU",
}

PIPE_WIDTH = 10_000
"""Lines into a pipe are not broken: the reader is `grep`, not an eye."""


def open_console(stream: TextIO | None = None) -> Console:
    """A console that prints text as it is, without reading markup, emoji or highlights into it."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def state_name(instance: Instance) -> str:
    """The state in lower case."""
    return Instance.State.Name(instance.state).lower()


def rung_name(rung: Readiness.Rung.ValueType) -> str:
    """The rung in lower case, `-` where none is reached."""
    return Readiness.Rung.Name(rung).lower() if rung else "-"


def instance_table(instances: Iterable[Instance], now: datetime) -> Table:
    """One line for each instance."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NAME", "STATE", "READY", "ADDRESSES", "NETWORKS", "CPUS", "MEMORY", "IMAGE", "AGE", "LABELS"):
        table.add_column(heading, no_wrap=heading in {"NAME", "STATE", "READY", "AGE"})
    for instance in instances:
        table.add_row(
            printable(instance.name),
            Text(state_name(instance), STATE_STYLES.get(instance.state, "")),
            rung_name(instance.readiness.reached),
            ", ".join(_short_address(address) for address in instance.addresses),
            ", ".join(" ".join([printable(nic.network), *_forwards(nic)]) for nic in instance.nics),
            str(instance.hardware.cpus),
            f"{instance.hardware.memory_mib} MiB",
            printable(instance.image),
            age((now - instance.create_time.ToDatetime(UTC)).total_seconds()),
            _labels(instance),
        )
    return table


def instance_details(instance: Instance) -> RenderableType:
    """Everything about one instance."""
    rows: dict[str, Text | str] = {
        "name": printable(instance.name),
        "uid": printable(instance.uid),
        "state": Text(state_name(instance), STATE_STYLES.get(instance.state, "")),
        "networks": "\n".join(_nic(nic) for nic in instance.nics),
        "addresses": "\n".join(_address(address) for address in instance.addresses),
        "cpus": str(instance.hardware.cpus),
        "memory": f"{instance.hardware.memory_mib} MiB",
        "image": printable(instance.image),
        "labels": _labels(instance),
        "autostart": "when the host has booted" if instance.autostart else "",
        "created": _time(instance.create_time),
        "starts": str(instance.generation),
        "readiness": ", ".join(f"{rung_name(s.rung)} {_seconds(s)}" for s in instance.readiness.steps),
        "frozen until": _time(instance.frozen_until) if instance.HasField("frozen_until") else "",
        "last exit": _last_exit(instance.last_exit) if instance.HasField("last_exit") else "",
        "revision": str(instance.revision),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            table.add_row(Text(name, "bold"), value)
    return table


def summary(instance: Instance) -> str:
    """One line that says where the instance is."""
    line = f"{printable(instance.name)}: {state_name(instance)}"
    if instance.state == Instance.FAILED:
        return f"{line}: {printable(instance.last_exit.detail)}"
    if instance.state == Instance.STOPPED and (step := STOP_STEPS.get(instance.last_exit.stop_step)):
        return f"{line} {step}"
    where = [printable(address.address) for address in instance.addresses]
    if instance.state == Instance.RUNNING:
        where += [forward for nic in instance.nics for forward in _forwards(nic)]
    return f"{line} at {', '.join(where)}" if where else line


def ladder(answer: WaitResponse) -> RenderableType:
    """The rungs that a start has reached, each with its time, and what it waits for."""
    instance = answer.instance
    table = Table.grid(padding=(0, 2))
    for step in instance.readiness.steps:
        table.add_row(Text("✓", "green"), rung_name(step.rung), Text(_seconds(step), "dim"))
    if answer.waiting_for:
        return Group(table, Spinner("dots", Text(f" waiting for {printable(answer.waiting_for)}", "cyan")))
    return table


def follow(answers: Iterable[WaitResponse], console: Console) -> Instance:
    """Shows a wait as it goes on, and gives the instance as it is at the end."""
    instance = Instance()
    if console.is_terminal:
        with Live(console=console) as live:
            for answer in answers:
                live.update(ladder(answer))
                instance = answer.instance
        return instance
    for answer in answers:
        known = {step.rung for step in instance.readiness.steps}
        for step in (step for step in answer.instance.readiness.steps if step.rung not in known):
            console.print(f"{rung_name(step.rung):<8} {_seconds(step)}")
        instance = answer.instance
    return instance


def change_line(change: WatchResponse, at: datetime) -> str:
    """One line for one change."""
    what = "deleted" if change.kind == WatchResponse.DELETED else summary(change.instance).partition(": ")[2]
    ready = rung_name(change.instance.readiness.reached)
    return f"{at:%H:%M:%S}  {change.revision:>6}  {printable(change.instance.name):<20} {ready:<8} {what}"


def network_table(networks: Iterable[Network]) -> Table:
    """One line for each network of the host."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NAME", "BRIDGE", "SUBNET", "HOST", "IPV6 SUBNET", "INSTANCES"):
        table.add_column(heading, no_wrap=True)
    for network in networks:
        table.add_row(
            network.name,
            network.bridge,
            network.subnet or "somebody else's",
            network.gateway or "-",
            network.ipv6_subnet or "-",
            "isolated" if network.isolated else "reach each other",
        )
    return table


def plan_text(plan: PlanResponse) -> str:
    """What would be made, as comments, and the command line, one option a line and quoted as for a shell.

    Its descriptors are the helper's, so a shell would not get far with it.
    """
    lines: list[list[str]] = []
    for word in plan.argv:
        if not lines or word.startswith("-"):
            lines.append([])
        lines[-1].append(word)
    command = " \\\n  ".join(shlex.join(line) for line in lines)
    comments = [
        printable(plan.accelerator),
        *_section("networks", [_nic(nic) for nic in plan.instance.nics]),
        *_section("devices", plan.devices),
        *_section("rules", plan.rules),
    ]
    return "\n".join([*(f"# {comment}".rstrip() for comment in comments), command])


def _section(title: str, texts: Iterable[str]) -> list[str]:
    """Lines under a title, indented as they are; nothing where there are none."""
    lines = ["  " + _indented(line) for text in texts for line in text.splitlines()]
    return [f"{title}:", *lines] if lines else []


def _indented(line: str) -> str:
    return line[: len(line) - len(line.lstrip())].expandtabs(2) + printable(line)


def age(seconds: float) -> str:
    """A duration in its largest whole unit."""
    for unit, size_s in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size_s:
            return f"{int(seconds // size_s)}{unit}"
    return f"{max(0, int(seconds))}s"


def _time(timestamp: Timestamp) -> str:
    return timestamp.ToDatetime(UTC).isoformat(sep=" ", timespec="seconds")


def _seconds(step: Readiness.Step) -> str:
    return f"{step.elapsed.ToTimedelta().total_seconds():.2f} s"


def _nic(nic: Nic) -> str:
    own = [printable(text) for text in (nic.network, nic.mac, nic.ipv4_address, nic.ipv6_address) if text]
    return ", ".join([*own, *_forwards(nic)])


def _forwards(nic: Nic) -> list[str]:
    """A port of the host that is not chosen yet is `*`."""
    return [
        f"127.0.0.1:{forward.host_port or '*'} → {forward.guest_port}/"
        f"{'udp' if forward.protocol == PortForward.UDP else 'tcp'}"
        for forward in nic.forwards
    ]


def _address(address: Address) -> str:
    interface = f" on {address.interface}" if address.interface else ""
    return printable(f"{address.address}/{address.prefix_length}{interface}, {address.mac} ({_source(address)})")


def _short_address(address: Address) -> str:
    """The guest itself is the usual source."""
    usual = address.source in (Address.AGENT, Address.SOURCE_UNSPECIFIED)
    return printable(address.address if usual else f"{address.address} ({_source(address)})")


def _source(address: Address) -> str:
    return Address.Source.Name(address.source).lower()


def _labels(instance: Instance) -> str:
    return ",".join(printable(f"{key}={value}") for key, value in sorted(instance.labels.items()))


def _last_exit(last: Exit) -> str:
    lines = [f"{Exit.Cause.Name(last.cause).lower()}: {last.detail}", *last.stderr_tail.splitlines()]
    return "\n".join(printable(line) for line in lines)
