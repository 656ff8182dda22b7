"""What values may be: names, labels, request ids, machines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.model.instance import LaunchSpec, check_launch
from vmherd.model.machine import Disk, DiskFormat, KernelBoot, Machine, Nic, NicBackend, check_machine, mac_of
from vmherd.model.names import check_labels, check_mac, check_name, check_request_id

UID = "0b5e8c3e-6f5b-4a52-9c4e-1f0a6f4d2a11"
MACHINE = Machine(
    uid=UID,
    name="web",
    generation=1,
    cpus=1,
    memory_mib=128,
    kernel_boot=KernelBoot("/images/kernel", "/images/initramfs", "console=ttyS0"),
    disks=(Disk("/disks/a.raw", DiskFormat.RAW),),
    nics=(Nic(mac_of(UID), NicBackend.USER),),
)


@pytest.mark.parametrize("name", ["a", "web", "web-1", "a" * 63, "a1-b2"])
def test_names_that_are_dns_labels(name: str) -> None:
    assert not list(check_name(name))


@pytest.mark.parametrize(
    "name",
    ["", "A", "1a", "-a", "a-", "a_b", "a.b", "a b", "a" * 64, "a" * 200, "ä", "a\n", "a\0", "../a", "a,b=c", "a/b"],
)
def test_names_that_are_none(name: str) -> None:
    [violation] = check_name(name)
    assert violation.field == "name"


@given(st.text())
def test_a_name_that_passes_is_safe_as_file_name_option_and_host_name(name: str) -> None:
    if not list(check_name(name)):
        assert name.isascii()
        assert name == name.lower()
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"": "x"}, "labels['']"),
        ({"a b": "x"}, "labels['a b']"),
        ({"a": "x" * 256}, "labels['a']"),
        ({"a": "line\nbreak"}, "labels['a']"),
        ({str(number): "" for number in range(65)}, "labels"),
    ],
)
def test_labels_that_are_refused(labels: dict[str, str], field: str) -> None:
    assert [violation.field for violation in check_labels(labels)] == [field]


def test_labels_that_are_taken() -> None:
    assert not list(check_labels({"ci": "", "example.org/team": "Ünïcode is fine"}))


@pytest.mark.parametrize("request_id", ["a b", "a" * 65, "ä", "a\n"])
def test_request_ids_that_are_refused(request_id: str) -> None:
    assert list(check_request_id(request_id))


@pytest.mark.parametrize(
    "mac", ["52:54:00:12:34", "5254.0012.3456", "01:00:5e:00:00:01", "52:54:00:12:34:5G", "00:00:00:00:00:00", ""]
)
def test_macs_that_are_refused(mac: str) -> None:
    assert list(check_mac(mac))


@given(st.uuids(), st.integers(0, 7))
def test_an_instance_s_mac_is_a_local_unicast_address_and_stays(uid: object, index: int) -> None:
    mac = mac_of(str(uid), index)
    assert not list(check_mac(mac))
    assert int(mac[:2], 16) & 2
    assert mac == mac_of(str(uid), index) != mac_of(str(uid), index + 1)


def test_a_machine_as_it_should_be() -> None:
    assert not list(check_machine(MACHINE))


@pytest.mark.parametrize(
    ("machine", "field"),
    [
        (replace(MACHINE, uid=UID.upper()), "uid"),
        (replace(MACHINE, uid="../" + UID), "uid"),
        (replace(MACHINE, name="a,b"), "name"),
        (replace(MACHINE, generation=0), "generation"),
        (replace(MACHINE, cpus=0), "cpus"),
        (replace(MACHINE, cpus=10_000), "cpus"),
        (replace(MACHINE, memory_mib=0), "memory_mib"),
        (replace(MACHINE, kernel_boot=KernelBoot("kernel", "", "")), "kernel_boot.kernel"),
        (replace(MACHINE, kernel_boot=KernelBoot("/a/../b", "", "")), "kernel_boot.kernel"),
        (replace(MACHINE, kernel_boot=KernelBoot("/a", "/b//c", "")), "kernel_boot.initramfs"),
        (replace(MACHINE, kernel_boot=KernelBoot("/a", "", "a\nb")), "kernel_boot.command_line"),
        (replace(MACHINE, kernel_boot=KernelBoot("/a", "", "a" * 2048)), "kernel_boot.command_line"),
        (replace(MACHINE, disks=(Disk("/a\0b", DiskFormat.RAW),)), "disks[0].path"),
        (replace(MACHINE, disks=(Disk("/a\nb", DiskFormat.RAW),)), "disks[0].path"),
        (replace(MACHINE, disks=MACHINE.disks * 17), "disks"),
        (replace(MACHINE, nics=(Nic("no", NicBackend.USER),)), "nics[0].mac"),
        (replace(MACHINE, nics=tuple(Nic(mac_of(UID, index), NicBackend.USER) for index in range(9))), "nics"),
        (replace(MACHINE, nics=MACHINE.nics * 2), "nics"),
    ],
)
def test_a_machine_with_one_thing_wrong(machine: Machine, field: str) -> None:
    assert [violation.field for violation in check_machine(machine)] == [field]


def test_a_launch_names_everything_that_is_wrong_at_once() -> None:
    spec = LaunchSpec(name="", cpus=0, memory_mib=0, labels={"": ""}, request_id=" ")
    assert [violation.field for violation in check_launch(spec)] == [
        "name",
        "hardware.cpus",
        "hardware.memory_mib",
        "labels['']",
        "request_id",
    ]
