from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.host.accelerator import Accelerator
from vmherd.model.machine import Disk, DiskFormat, KernelBoot, Machine, Nic, NicBackend, PortForward, Protocol
from vmherd.qemu import command_line
from vmherd.qemu.command_line import Descriptors

GOLDEN = Path(__file__).parent / "golden"
UID = "6b1f3b0e-5f0c-4b54-9d3c-0123456789ab"

SMALL = Machine(
    uid=UID,
    name="small",
    generation=1,
    cpus=1,
    memory_mib=128,
    kernel_boot=KernelBoot("/var/lib/vmherd/images/builtin/kernel", "", ""),
)
FULL = Machine(
    uid=UID,
    name="full",
    generation=7,
    cpus=4,
    memory_mib=4096,
    kernel_boot=KernelBoot(
        "/var/lib/vmherd/images/builtin/kernel",
        "/var/lib/vmherd/images/builtin/initramfs",
        "console=ttyS0 root=/dev/vda, quiet",
    ),
    disks=(
        Disk(f"/var/lib/vmherd/instances/{UID}/disk.raw", DiskFormat.RAW),
        Disk("/var/lib/vmherd/images/base/disk.qcow2", DiskFormat.QCOW2, read_only=True),
    ),
    nics=(
        Nic(
            "52:54:00:12:34:56",
            NicBackend.USER,
            forwards=(PortForward(Protocol.TCP, 22), PortForward(Protocol.UDP, 53, host_port=5353)),
        ),
        Nic("52:54:00:12:34:57", NicBackend.BRIDGE, network="office", ipv4_address="10.20.30.2"),
    ),
)


def argv(machine: Machine, accelerator: Accelerator = "tcg") -> tuple[str, ...]:
    return command_line.argv(
        machine,
        qemu_binary=Path("/usr/bin/qemu-system-x86_64"),
        accelerator=accelerator,
        descriptors=Descriptors.of(machine, itertools.count(3)),
    )


@pytest.mark.parametrize(
    ("golden", "machine", "accelerator"),
    [("small-tcg", SMALL, "tcg"), ("small-kvm", SMALL, "kvm"), ("full-tcg", FULL, "tcg")],
)
def test_the_command_line_is_the_golden_one(golden: str, machine: Machine, accelerator: Accelerator) -> None:
    assert "\n".join(argv(machine, accelerator)) + "\n" == (GOLDEN / f"{golden}.txt").read_text()


@pytest.mark.parametrize(
    ("memory_mib", "size_mib"), [(32, 64), (128, 64), (256, 128), (1000, 500), (1024, 512), (65536, 512)]
)
def test_the_buffer_of_translated_code_grows_with_the_memory(memory_mib: int, size_mib: int) -> None:
    assert f"tcg,thread=multi,tb-size={size_mib}" in argv(replace(SMALL, memory_mib=memory_mib))


def test_descriptors_come_in_the_order_of_the_fields() -> None:
    assert Descriptors.of(SMALL, itertools.count(3)) == Descriptors(3, 4, 5, 6, None, (), 7, {})
    assert Descriptors.of(FULL, itertools.count(3)) == Descriptors(3, 4, 5, 6, 7, (8, 9), 10, {1: 11})


def test_no_name_of_a_file_is_on_the_command_line() -> None:
    assert "/var/lib" not in " ".join(argv(FULL))


def parsed(words: str) -> dict[str, str]:
    """Key and value as QEMU reads them: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, keyval."""
    values: dict[str, str] = {}
    text = words.replace(",,", "\0")
    for word in text.split(","):
        key, _, value = word.partition("=")
        values[key] = value.replace("\0", ",")
    return values


@given(st.text(st.characters(exclude_characters="\0")), st.text(st.characters(exclude_characters="\0")))
def test_no_value_becomes_an_option(path: str, name: str) -> None:
    assert parsed(command_line.option(path=path, name=name)) == {"path": path, "name": name}


@pytest.mark.parametrize(
    "hostile",
    ["x,server=off", "x,,server=off", "x,", ",x", "=x", "a=b,c=d", "x\n-monitor stdio", "../x,path=/etc/passwd"],
)
def test_hostile_values_stay_in_their_word(hostile: str) -> None:
    """Even a value that the policy refuses would not become an option or a word of its own."""
    boot = replace(FULL.kernel_boot, command_line=hostile)
    machine = replace(FULL, name=hostile, kernel_boot=boot, nics=(Nic(hostile, NicBackend.USER),))
    harmless = replace(FULL, name="name", nics=(Nic("mac", NicBackend.USER),))
    words, expected = argv(machine), argv(harmless)
    assert len(words) == len(expected)
    differing = [(word, other) for word, other in zip(words, expected, strict=True) if word != other]
    assert len(differing) == 3
    assert differing[1][0] == hostile  # -append takes any text
    for word, other in (differing[0], differing[2]):
        assert parsed(word).keys() == parsed(other).keys()
        assert [value for value in parsed(word).values() if value == hostile] == [hostile]
