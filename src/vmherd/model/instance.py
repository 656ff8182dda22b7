"""An instance: what the controller knows of a named virtual machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum

from vmherd.model.errors import FieldViolation
from vmherd.model.lifecycle import Event, State, after
from vmherd.model.machine import check_cpus, check_memory
from vmherd.model.names import check_labels, check_name, check_request_id
from vmherd.model.readiness import Readiness


@dataclass(frozen=True)
class Hardware:
    """Virtual hardware."""

    cpus: int
    memory_mib: int


@dataclass(frozen=True)
class Address:
    """An address of the guest on one of the instance's network interfaces."""

    address: str
    prefix_length: int
    mac: str
    interface: str


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


def check_launch(spec: LaunchSpec) -> Iterator[FieldViolation]:
    """Everything that is wrong with a launch's values, without regard to any host."""
    yield from check_name(spec.name)
    if spec.cpus is not None:
        yield from check_cpus(spec.cpus, "hardware.cpus")
    if spec.memory_mib is not None:
        yield from check_memory(spec.memory_mib, "hardware.memory_mib")
    yield from check_labels(spec.labels)
    yield from check_request_id(spec.request_id)
