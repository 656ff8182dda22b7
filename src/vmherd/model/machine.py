"""What the helper is told of a machine, and what it may be told.

The controller fills it in and the helper checks it again: both use `check_machine`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from vmherd.model.errors import FieldViolation
from vmherd.model.names import check_mac, check_name, check_uid
from vmherd.model.network import check_ipv4_address

CPUS_MAX = 255
"""Q35 without interrupt remapping knows 8-bit APIC ids, and 255 is the broadcast."""

MEMORY_MIN_MIB = 32
MEMORY_MAX_MIB = 64 * 1024 * 1024
DISKS_MAX = 16
NICS_MAX = 8
FORWARDS_MAX = 64
PORT_MAX = 65535
AGENT_CHARDEV_ID = "qga0"
AGENT_PORT_ID = "agent0"
"""What the guest agent's channel is called on the command line, and in what QEMU tells of it."""

COMMAND_LINE_MAX_BYTES = 2047
"""COMMAND_LINE_SIZE of Linux on x86, less its NUL."""


class DiskFormat(StrEnum):
    """How a disk's file is laid out."""

    RAW = "raw"
    QCOW2 = "qcow2"


class NicBackend(StrEnum):
    """What a network interface is plugged into."""

    USER = "user"
    BRIDGE = "bridge"


class Protocol(StrEnum):
    """A transport protocol."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True)
class KernelBoot:
    """A kernel that QEMU loads itself."""

    kernel: str
    initramfs: str
    command_line: str


@dataclass(frozen=True)
class Disk:
    """A disk of a machine."""

    path: str
    format: DiskFormat
    read_only: bool = False


@dataclass(frozen=True)
class PortForward:
    """A port of the host's 127.0.0.1 that leads into a guest."""

    protocol: Protocol
    guest_port: int
    host_port: int = 0
    """0: QEMU binds a free one."""


@dataclass(frozen=True)
class Nic:
    """A network interface of a machine."""

    mac: str
    backend: NicBackend
    network: str = ""
    """Of a bridge's: the name of the network."""
    ipv4_address: str = ""
    """Of a bridge's, on a network with a subnet: the one that it gets by DHCP and may use."""
    forwards: tuple[PortForward, ...] = ()
    """Of a user-mode network's."""


@dataclass(frozen=True)
class Machine:
    """A machine to run: everything that its command line depends on beside the host's settings."""

    uid: str
    name: str
    generation: int
    cpus: int
    memory_mib: int
    kernel_boot: KernelBoot
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()


def mac_of(uid: str, index: int = 0) -> str:
    """The MAC address of an instance's NIC: locally administered, 40 bits from the instance's uid."""
    digest = hashlib.sha256(f"{uid}/{index}".encode()).digest()
    return ":".join(["52", *(f"{byte:02x}" for byte in digest[:5])])


def check_cpus(cpus: int, field: str = "cpus") -> Iterator[FieldViolation]:
    """The number of virtual CPUs."""
    if not 1 <= cpus <= CPUS_MAX:
        yield FieldViolation(field, f"must be from 1 to {CPUS_MAX}, is {cpus}")


def check_memory(memory_mib: int, field: str = "memory_mib") -> Iterator[FieldViolation]:
    """The memory, without regard to any host."""
    if not MEMORY_MIN_MIB <= memory_mib <= MEMORY_MAX_MIB:
        yield FieldViolation(field, f"must be from {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB} MiB, is {memory_mib}")


def check_path(path: str, field: str) -> Iterator[FieldViolation]:
    """A path is absolute, plain and printable. Where it may lead is the helper's policy."""
    if not path.startswith("/") or str(PurePosixPath(path)) != path or ".." in PurePosixPath(path).parts:
        yield FieldViolation(field, f"must be an absolute path without '.', '..' and doubled '/', is {path!r}")
    elif not path.isprintable():
        yield FieldViolation(field, f"must be printable, is {path!r}")


def check_machine(machine: Machine) -> Iterator[FieldViolation]:
    """Everything that is wrong with a machine's values."""
    yield from check_uid(machine.uid)
    yield from check_name(machine.name)
    if not 1 <= machine.generation < 2**32:
        yield FieldViolation("generation", "must be at least 1")
    yield from check_cpus(machine.cpus)
    yield from check_memory(machine.memory_mib)
    yield from check_path(machine.kernel_boot.kernel, "kernel_boot.kernel")
    if machine.kernel_boot.initramfs:
        yield from check_path(machine.kernel_boot.initramfs, "kernel_boot.initramfs")
    command_line = machine.kernel_boot.command_line
    if len(command_line.encode()) > COMMAND_LINE_MAX_BYTES or not command_line.isprintable():
        yield FieldViolation("kernel_boot.command_line", f"must have at most {COMMAND_LINE_MAX_BYTES} printable bytes")
    if len(machine.disks) > DISKS_MAX:
        yield FieldViolation("disks", f"must be at most {DISKS_MAX}, are {len(machine.disks)}")
    for index, disk in enumerate(machine.disks):
        yield from check_path(disk.path, f"disks[{index}].path")
    if len(machine.nics) > NICS_MAX:
        yield FieldViolation("nics", f"must be at most {NICS_MAX}, are {len(machine.nics)}")
    for index, nic in enumerate(machine.nics):
        yield from check_nic(nic, f"nics[{index}]")
    if len({nic.mac for nic in machine.nics}) < len(machine.nics):
        yield FieldViolation("nics", "must have a MAC address each")


def check_nic(nic: Nic, field: str) -> Iterator[FieldViolation]:
    """Everything that is wrong with a network interface's values, without regard to any network."""
    yield from check_mac(nic.mac, f"{field}.mac")
    if nic.backend is NicBackend.BRIDGE:
        yield from check_name(nic.network, f"{field}.network")
        if nic.ipv4_address:
            yield from check_ipv4_address(nic.ipv4_address, f"{field}.ipv4_address")
        if nic.forwards:
            yield FieldViolation(
                f"{field}.forwards", "are for a user-mode network: on a bridge the guest has an address"
            )
        return
    for name in ("network", "ipv4_address"):
        if getattr(nic, name):
            yield FieldViolation(f"{field}.{name}", "is for a network interface on a bridge")
    yield from check_forwards(nic.forwards, f"{field}.forwards")


def check_forwards(forwards: Sequence[PortForward], field: str) -> Iterator[FieldViolation]:
    """Port forwards have ports, and no port of the host twice."""
    if len(forwards) > FORWARDS_MAX:
        yield FieldViolation(field, f"must be at most {FORWARDS_MAX}, are {len(forwards)}")
    for index, forward in enumerate(forwards):
        for name, lowest in (("guest_port", 1), ("host_port", 0)):
            if not lowest <= (port := getattr(forward, name)) <= PORT_MAX:
                yield FieldViolation(f"{field}[{index}].{name}", f"must be from {lowest} to {PORT_MAX}, is {port}")
    fixed = Counter(f"{forward.host_port}/{forward.protocol}" for forward in forwards if forward.host_port)
    for port, count in fixed.items():
        if count > 1:
            yield FieldViolation(
                field, f"the host's port {port} is given {count} times; each leads to one port of a guest"
            )
