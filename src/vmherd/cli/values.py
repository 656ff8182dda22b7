"""What people type, as values."""

from __future__ import annotations

import re
import signal
from datetime import timedelta

import typer
from google.protobuf.duration_pb2 import Duration

from vmherd.api.v1.instance_pb2 import Nic, PortForward
from vmherd.model.network import NO_NETWORK, USER_NETWORK

_NIC_FIELDS = {"mac": "mac", "address": "ipv4_address"}
_FORWARD = re.compile(r"(?:([0-9]{1,5}):)?([0-9]{1,5})(?:/(tcp|udp))?")


def pairs(given: list[str], option: str) -> dict[str, str]:
    """The KEY=VALUE arguments of a repeated option."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{option} wants KEY=VALUE, got {text!r}")
        found[key] = value
    return found


def nics(networks: list[str], forwards: list[str]) -> list[Nic]:
    """The network interfaces of `--network` and `--forward`; none where the host's default is wanted.

    Forwards belong to the first user-mode network, which there is where nothing else was asked for.
    """
    found = [_nic(text) for text in networks or ([USER_NETWORK] if forwards else [])]
    if len(found) > 1 and any(nic.network == NO_NETWORK for nic in found):
        raise typer.BadParameter(f"--network {NO_NETWORK} stands for no network at all, so it goes alone")
    if forwards:
        user = next((nic for nic in found if nic.network == USER_NETWORK), None)
        if not user:
            raise typer.BadParameter(f"--forward leads into a user-mode network: add `--network {USER_NETWORK}`")
        user.forwards.extend(_forward(text) for text in forwards)
    return found


def _nic(text: str) -> Nic:
    wrong = typer.BadParameter(f"--network wants NAME[,mac=MAC][,address=IPV4], got {text!r}")
    network, *options = text.split(",")
    if not network or "=" in network:
        raise wrong
    nic = Nic(network=network)
    for option in options:
        name, _, value = option.partition("=")
        field = _NIC_FIELDS.get(name)
        if not field or not value or getattr(nic, field):
            raise wrong
        setattr(nic, field, value.lower())  # MAC addresses are also printed in capitals
    return nic


def _forward(text: str) -> PortForward:
    parsed = _FORWARD.fullmatch(text)
    if not parsed:
        raise typer.BadParameter(f"--forward wants [HOST_PORT:]GUEST_PORT[/udp], got {text!r}")
    host_port, guest_port, protocol = parsed.groups()
    return PortForward(
        protocol=PortForward.Protocol.Value((protocol or "tcp").upper()),
        guest_port=int(guest_port),
        host_port=int(host_port or 0),
    )


def duration(seconds: float | None) -> Duration | None:
    """The message for a time in seconds."""
    if seconds is None:
        return None
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def signal_number(text: str, option: str) -> int:
    """The number of a signal given as a number or a name, with or without SIG."""
    name = text.upper()
    known = signal.Signals.__members__
    found = known.get(name) or known.get(f"SIG{name}")
    if found:
        return found
    if name.isdecimal():
        return int(name)
    raise typer.BadParameter(f"{option} wants a signal such as TERM or 15, got {text!r}")
