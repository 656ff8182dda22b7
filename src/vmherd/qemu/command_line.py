"""The one place that knows QEMU's command line: a pure function from a checked machine to the words of its argv.

The options are described in https://www.qemu.org/docs/master/system/invocation.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from vmherd.model.layout import InstanceRun
from vmherd.model.machine import AGENT_CHARDEV_ID, AGENT_PORT_ID, Disk, Machine, Nic, NicBackend
from vmherd.qemu.accelerator import CPU_MODEL, Accelerator

AGENT_PORT_NAME = "org.qemu.guest_agent.0"
TRANSLATIONS_MIN_MIB = 64
TRANSLATIONS_MAX_MIB = 512


def argv(
    machine: Machine, *, qemu_binary: Path, accelerator: Accelerator, run: InstanceRun, console_log: Path
) -> tuple[str, ...]:
    """The words that start a machine, the program first. The machine has passed `policy.check_values`."""
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
        *_kernel(machine),
        *("-chardev", _listening(run.qmp, id="qmp")),
        *("-mon", option(chardev="qmp", mode="control")),
        *("-chardev", _listening(run.console, id="console", logfile=console_log, logappend=True)),
        *("-serial", "chardev:console"),
        *("-chardev", _listening(run.agent, id=AGENT_CHARDEV_ID)),
        *("-device", "virtio-serial"),
        # Without its id the port has no VSERPORT_CHANGE event.
        *("-device", option("virtserialport", chardev=AGENT_CHARDEV_ID, name=AGENT_PORT_NAME, id=AGENT_PORT_ID)),
        *("-object", option("rng-builtin", id="rng0")),
        *("-device", option("virtio-rng-pci", rng="rng0")),
        *("-device", "pvpanic-pci"),
        *(word for index, disk in enumerate(machine.disks) for word in _disk(index, disk)),
        *(word for index, nic in enumerate(machine.nics) for word in _nic(index, nic)),
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


def _listening(path: Path, **values: str | int | Path) -> str:
    return option("socket", path=path, server=True, wait=False, **values)


def _kernel(machine: Machine) -> Iterator[str]:
    boot = machine.kernel_boot
    yield from ("-kernel", boot.kernel)
    if boot.initramfs:
        yield from ("-initrd", boot.initramfs)
    if boot.command_line:
        yield from ("-append", boot.command_line)


def _disk(index: int, disk: Disk) -> Iterator[str]:
    node = f"disk{index}"
    both: dict[str, str | int] = {"read_only": disk.read_only, "discard": "unmap"}
    yield from ("-blockdev", option("", driver="file", node_name=f"{node}-file", filename=disk.path, **both))
    # The driver is named: QEMU never looks at what a guest wrote to find out what it is.
    yield from ("-blockdev", option("", driver=disk.format, node_name=node, file=f"{node}-file", **both))
    yield from ("-device", option("virtio-blk-pci", drive=node, id=f"{node}-device"))


NETDEVS: Mapping[NicBackend, Callable[[str], str]] = MappingProxyType(
    {NicBackend.USER: lambda netdev: option("user", id=netdev)}
)
"""What a network interface is plugged into. A backend that passes a descriptor has its place here."""


def _nic(index: int, nic: Nic) -> Iterator[str]:
    netdev = f"net{index}"
    yield from ("-netdev", NETDEVS[nic.backend](netdev))
    # No boot ROM: nothing boots from the network, and the firmware need not look.
    device = option("virtio-net-pci", netdev=netdev, mac=nic.mac, romfile="", id=f"{netdev}-device")
    yield from ("-device", device)
