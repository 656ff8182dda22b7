"""The one place that knows QEMU's command line: a pure function from a checked machine to the words of its argv.

QEMU opens no file of a machine by its name: it is given descriptors, which the command line has the numbers of. The
options are described in https://www.qemu.org/docs/master/system/invocation.html
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vmherd.host.accelerator import CPU_MODEL, Accelerator
from vmherd.model.machine import AGENT_CHARDEV_ID, AGENT_PORT_ID, Disk, Machine, Nic, NicBackend, PortForward

AGENT_PORT_NAME = "org.qemu.guest_agent.0"
TRANSLATIONS_MIN_MIB = 64
TRANSLATIONS_MAX_MIB = 512


@dataclass(frozen=True)
class Descriptors:
    """The descriptors that QEMU inherits: of listening sockets, and of files that are open for what it does to them."""

    qmp: int
    console: int
    agent: int
    kernel: int
    initramfs: int | None
    disks: tuple[int, ...]
    console_log: int
    taps: Mapping[int, int]
    """Of each network interface on a bridge, by its place among the machine's."""

    @classmethod
    def of(cls, machine: Machine, numbers: Iterator[int]) -> Descriptors:
        """Descriptors that come in the order of the fields."""
        qmp, console, agent, kernel = itertools.islice(numbers, 4)
        initramfs = next(numbers) if machine.kernel_boot.initramfs else None
        disks = tuple(itertools.islice(numbers, len(machine.disks)))
        bridged = (index for index, nic in enumerate(machine.nics) if nic.backend is NicBackend.BRIDGE)
        console_log = next(numbers)
        taps = {index: next(numbers) for index in bridged}
        return cls(qmp, console, agent, kernel, initramfs, disks, console_log, taps)


def argv(machine: Machine, *, qemu_binary: Path, accelerator: Accelerator, descriptors: Descriptors) -> tuple[str, ...]:
    """The words that start a machine, the program first. The machine has passed `policy.check_values`."""
    fds = descriptors
    return (
        str(qemu_binary),
        *("-name", option(guest=machine.name, debug_threads=True)),
        *("-uuid", machine.uid),
        *("-sandbox", option("on", obsolete="deny", elevateprivileges="deny", spawn="deny", resourcecontrol="deny")),
        *("-no-user-config", "-nodefaults", "-display", "none"),
        # The guest's memory is its own: it stays out of a core file.
        *("-machine", option("q35", vmport=False, dump_guest_core=False)),
        *("-accel", ACCELERATORS[accelerator](machine)),
        *("-cpu", CPU_MODEL),
        *("-smp", str(machine.cpus)),
        *("-m", f"{machine.memory_mib}M"),
        # A reset keeps the process; power-off and panic end it, and QMP's SHUTDOWN event tells which it was.
        *("-action", option(reboot="reset", shutdown="poweroff", panic="shutdown")),
        *_kernel(machine, fds),
        *("-chardev", _listening(fds.qmp, id="qmp")),
        *("-mon", option(chardev="qmp", mode="control")),
        *_named(fds.console_log),
        *("-chardev", _listening(fds.console, id="console", logfile=_name(fds.console_log), logappend=True)),
        *("-serial", "chardev:console"),
        *("-chardev", _listening(fds.agent, id=AGENT_CHARDEV_ID)),
        *("-device", "virtio-serial"),
        # Without its id the port has no VSERPORT_CHANGE event.
        *("-device", option("virtserialport", chardev=AGENT_CHARDEV_ID, name=AGENT_PORT_NAME, id=AGENT_PORT_ID)),
        *("-object", option("rng-builtin", id="rng0")),
        *("-device", option("virtio-rng-pci", rng="rng0")),
        *("-device", "pvpanic-pci"),
        *(word for index, disk in enumerate(machine.disks) for word in _disk(index, disk, fds.disks[index])),
        *(word for index, nic in enumerate(machine.nics) for word in _nic(index, nic, fds.taps.get(index))),
    )


def option(kind: str = "", /, **values: str | int | Path) -> str:
    """`kind,key=value,…`, with '-' for each '_' of a key and on or off for a bool.

    QEMU splits at commas, so each comma of a value is doubled, and no value can become an option.
    """
    words = [kind] if kind else []
    for key, value in values.items():
        text = ("off", "on")[value] if isinstance(value, bool) else str(value)
        words.append(f"{key.replace('_', '-')}={text.replace(',', ',,')}")
    return ",".join(words)


def _tcg(machine: Machine) -> str:
    # QEMU would take up to 1 GiB for translated code. Half of the guest's memory is enough for a boot not to
    # translate anything twice, and keeps the process of a guest of 128 MiB near 150 MiB.
    size_mib = min(max(machine.memory_mib // 2, TRANSLATIONS_MIN_MIB), TRANSLATIONS_MAX_MIB)
    return option("tcg", thread="multi", tb_size=size_mib)


ACCELERATORS: Mapping[Accelerator, Callable[[Machine], str]] = MappingProxyType(
    {"kvm": lambda _machine: "kvm", "tcg": _tcg}
)


def _listening(descriptor: int, **values: str | int) -> str:
    return option("socket", fd=descriptor, server=True, wait=False, **values)


def _kernel(machine: Machine, descriptors: Descriptors) -> Iterator[str]:
    # The loader takes names alone; this one leads to the open file, whatever its directory has under its name by now.
    yield from ("-kernel", f"/proc/self/fd/{descriptors.kernel}")
    if descriptors.initramfs is not None:
        yield from ("-initrd", f"/proc/self/fd/{descriptors.initramfs}")
    if machine.kernel_boot.command_line:
        yield from ("-append", machine.kernel_boot.command_line)


def _named(descriptor: int) -> Iterator[str]:
    """Makes `_name` mean the descriptor, where QEMU takes names of files alone."""
    yield from ("-add-fd", option(fd=descriptor, set=descriptor))


def _name(descriptor: int) -> str:
    return f"/dev/fdset/{descriptor}"


def _disk(index: int, disk: Disk, descriptor: int) -> Iterator[str]:
    node = f"disk{index}"
    both: dict[str, str | int] = {"read_only": disk.read_only, "discard": "unmap"}
    yield from _named(descriptor)
    yield from ("-blockdev", option("", driver="file", node_name=f"{node}-file", filename=_name(descriptor), **both))
    # The driver is named: QEMU never looks at what a guest wrote to find out what it is.
    yield from ("-blockdev", option("", driver=disk.format, node_name=node, file=f"{node}-file", **both))
    yield from ("-device", option("virtio-blk-pci", drive=node, id=f"{node}-device"))


def _user(netdev: str, nic: Nic, _tap: int | None) -> str:
    return ",".join([option("user", id=netdev), *(option(hostfwd=_forward(forward)) for forward in nic.forwards)])


def _forward(forward: PortForward) -> str:
    return f"{forward.protocol}:127.0.0.1:{forward.host_port}-:{forward.guest_port}"


def _bridge(netdev: str, _nic: Nic, tap: int | None) -> str:
    return option("tap", id=netdev, fd=str(tap))


NETDEVS: Mapping[NicBackend, Callable[[str, Nic, int | None], str]] = MappingProxyType(
    {NicBackend.USER: _user, NicBackend.BRIDGE: _bridge}
)
"""What a network interface is plugged into."""


def _nic(index: int, nic: Nic, tap: int | None) -> Iterator[str]:
    netdev = f"net{index}"
    yield from ("-netdev", NETDEVS[nic.backend](netdev, nic, tap))
    # No boot ROM: nothing boots from the network, and the firmware need not look.
    device = option("virtio-net-pci", netdev=netdev, mac=nic.mac, romfile="", id=f"{netdev}-device")
    yield from ("-device", device)
