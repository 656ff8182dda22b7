"""An instance: what the controller knows of a named virtual machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from itertools import repeat

from vmherd.model.errors import FieldViolation
from vmherd.model.lifecycle import Event, State, after
from vmherd.model.machine import NICS_MAX, PortForward, check_cpus, check_forwards, check_memory
from vmherd.model.names import check_labels, check_mac, check_name, check_request_id
from vmherd.model.network import NO_NETWORK, USER_NETWORK, check_ipv4_address
from vmherd.model.readiness import Readiness


@dataclass(frozen=True)
class Hardware:
    """Virtual hardware."""

    cpus: int
    memory_mib: int


class Source(IntEnum):
    """Who tells an address of the guest, from the most to the least trusted."""

    AGENT = 1
    LEASE = 2
    NEIGHBOUR = 3


@dataclass(frozen=True)
class Address:
    """An address of the guest on one of the instance's network interfaces."""

    address: str
    prefix_length: int
    mac: str
    interface: str = ""
    """The interface's name inside the guest, where the agent tells it."""
    source: Source = Source.AGENT


@dataclass(frozen=True)
class NetworkInterface:
    """A network interface: as it is asked for, where an empty value leaves the choice to vmherd, and as it is then."""

    network: str = ""
    """Name of a network of the host, or `user`; asked for, also `none`."""
    mac: str = ""
    ipv4_address: str = ""
    """What the network's DHCP server gives it, for as long as the instance is there."""
    ipv6_address: str = ""
    """What it gives itself; follows from the MAC address."""
    forwards: tuple[PortForward, ...] = ()
    bound_ports: tuple[int, ...] = ()
    """Ports of the host that QEMU has bound, one for each forward; empty while it does not run."""

    @property
    def on_bridge(self) -> bool:
        """Whether it is plugged into a network of the host."""
        return self.network != USER_NETWORK

    @property
    def ports_known(self) -> bool:
        """Whether it is known for each forward which port of the host QEMU has bound."""
        return len(self.bound_ports) == len(self.forwards)


class Cause(StrEnum):
    """Why a QEMU process ended, or why there was none."""

    STOPPED = "STOPPED"
    GUEST_SHUTDOWN = "GUEST_SHUTDOWN"
    GUEST_PANIC = "GUEST_PANIC"
    CRASHED = "CRASHED"
    START_FAILED = "START_FAILED"
    VANISHED = "VANISHED"


class StopStep(IntEnum):
    """The steps of a stop, from gentle to hard."""

    AGENT = 1
    POWER_BUTTON = 2
    QUIT = 3
    KILL = 4


@dataclass(frozen=True)
class Exit:
    """How a QEMU process ended, or why there was none."""

    cause: Cause
    detail: str
    ended_at_s: float
    stop_step: StopStep | None = None
    exit_code: int | None = None
    signal: int | None = None
    stderr_tail: str = ""


class Verb(StrEnum):
    """The commands that change an instance over time."""

    LAUNCH = "launch"
    START = "start"
    STOP = "stop"
    RESTART = "restart"
    DELETE = "delete"


@dataclass(frozen=True)
class Operation:
    """A command that was accepted and has not yet come to its end. It survives the controller."""

    id: str
    verb: Verb
    request_ids: tuple[str, ...] = ()
    """Those who asked for it with a request id: several when a stop joined one that was under way."""
    force: bool = False
    grace_s: float | None = None
    """None: the controller's setting."""


@dataclass(frozen=True)
class Instance:
    """What is known of an instance, as it is stored."""

    name: str
    uid: str
    image: str
    hardware: Hardware
    labels: Mapping[str, str]
    created_at_s: float
    state: State = State.STOPPED
    generation: int = 0
    accepted_at_s: float = 0.0
    """When the current start was accepted, in seconds since the epoch."""
    readiness: Readiness = field(default_factory=Readiness)
    addresses: tuple[Address, ...] = ()
    frozen_until_s: float | None = None
    """When vmherd thaws the guest's file systems, in seconds since the epoch; None while it need not."""
    last_exit: Exit | None = None
    operation: Operation | None = None
    nics: tuple[NetworkInterface, ...] = ()
    autostart: bool = False
    """It is started when the host has booted."""

    @property
    def on_bridge(self) -> bool:
        """Whether it is plugged into a network of the host."""
        return any(nic.on_bridge for nic in self.nics)


def bound(
    nics: Sequence[NetworkInterface], ports: Iterable[tuple[int, ...]] = repeat(())
) -> tuple[NetworkInterface, ...]:
    """Network interfaces with the ports that QEMU has bound for each of them, or with none."""
    return tuple(replace(nic, bound_ports=its) for nic, its in zip(nics, ports, strict=False))


def started(instance: Instance, now_s: float) -> Instance:
    """The instance right after a start was accepted."""
    return replace(
        instance,
        state=after(instance.state, Event.START),
        generation=instance.generation + 1,
        accepted_at_s=now_s,
        readiness=Readiness(),
        addresses=(),
        frozen_until_s=None,
        nics=bound(instance.nics),
    )


@dataclass(frozen=True)
class LaunchSpec:
    """What a user asks for; None leaves the choice to the image."""

    name: str
    image: str = "builtin"
    cpus: int | None = None
    memory_mib: int | None = None
    start: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    nics: tuple[NetworkInterface, ...] = ()
    """Empty for one with every choice left to vmherd; one of network `none` for none."""
    autostart: bool = False


def check_launch(spec: LaunchSpec) -> Iterator[FieldViolation]:
    """Everything that is wrong with a launch's values, without regard to any host."""
    yield from check_name(spec.name)
    if spec.cpus is not None:
        yield from check_cpus(spec.cpus, "hardware.cpus")
    if spec.memory_mib is not None:
        yield from check_memory(spec.memory_mib, "hardware.memory_mib")
    yield from check_labels(spec.labels)
    yield from check_request_id(spec.request_id)
    if len(spec.nics) > NICS_MAX:
        yield FieldViolation("nics", f"must be at most {NICS_MAX}, are {len(spec.nics)}")
    for index, nic in enumerate(spec.nics):
        yield from _check_nic(nic, f"nics[{index}]")
    fixed = [{(each.protocol, each.host_port) for each in nic.forwards if each.host_port} for nic in spec.nics]
    if len(set().union(*fixed)) < sum(map(len, fixed)):
        yield FieldViolation("nics", "must not have the same port of the host twice")
    if len(spec.nics) > 1 and any(nic.network == NO_NETWORK for nic in spec.nics):
        yield FieldViolation("nics", f"{NO_NETWORK!r} stands for no network interface, so it must be the only one")


def _check_nic(nic: NetworkInterface, field: str) -> Iterator[FieldViolation]:
    if nic.network:
        yield from check_name(nic.network, f"{field}.network")
    if nic.mac:
        yield from check_mac(nic.mac, f"{field}.mac")
    if nic.ipv4_address:
        yield from check_ipv4_address(nic.ipv4_address, f"{field}.ipv4_address")
    if nic.ipv6_address:
        yield FieldViolation(f"{field}.ipv6_address", "follows from the MAC address and cannot be chosen")
    yield from check_forwards(nic.forwards, f"{field}.forwards")
    if nic.network == NO_NETWORK and nic != NetworkInterface(NO_NETWORK):
        yield FieldViolation(field, f"{NO_NETWORK!r} stands for no network interface, so nothing else can be given")
