from __future__ import annotations

import os
import socket
import stat
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from vmherd.model.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from vmherd.model.layout import StateDirectory
from vmherd.model.machine import Disk, DiskFormat, KernelBoot, Machine
from vmherd.qemu import files, policy

UID = "6b1f3b0e-5f0c-4b54-9d3c-0123456789ab"
OTHER_UID = "00000000-0000-0000-0000-000000000000"
HOST_MEMORY_MIB = 1024
OWN = files.Owners(os.geteuid(), os.getegid(), machines=None)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    """A state directory with an image and an instance, beside a file that nobody may touch."""
    state = StateDirectory(tmp_path / "state, of vmherd")
    for directory in (state.images / "small", state.instance(UID).path, state.instance(OTHER_UID).path):
        directory.mkdir(parents=True)
    for file in (kernel(state), state.instance(UID).disk, state.instance(OTHER_UID).disk, secret(state)):
        file.write_bytes(b"x")
    return state


def kernel(state: StateDirectory) -> Path:
    return state.images / "small" / "kernel"


def secret(state: StateDirectory) -> Path:
    return state.path.parent / "secret"


def machine(state: StateDirectory) -> Machine:
    return Machine(
        uid=UID,
        name="small",
        generation=1,
        cpus=1,
        memory_mib=128,
        kernel_boot=KernelBoot(str(kernel(state)), "", ""),
        disks=(Disk(str(state.instance(UID).disk), DiskFormat.RAW),),
    )


def check(machine: Machine, state: StateDirectory) -> None:
    policy.check_values(machine, state=state, host_memory_mib=HOST_MEMORY_MIB)
    with files.opened(machine, state, OWN, others=()):
        pass


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def refused(machine: Machine, state: StateDirectory, field: str) -> str:
    """Why the machine is refused, for a path in one field."""
    before = open_descriptors()
    with pytest.raises(PermissionDenied) as caught:
        check(machine, state)
    assert open_descriptors() == before
    assert caught.value.reason == "PATH_REFUSED"
    assert caught.value.metadata["field"] == field
    assert caught.value.message.startswith(f"{field}: {caught.value.metadata['path']} ")
    return caught.value.message


def test_a_plain_machine_is_allowed_and_no_descriptor_stays_open(state: StateDirectory) -> None:
    before = open_descriptors()
    check(machine(state), state)
    assert open_descriptors() == before


def test_all_wrong_values_are_named_at_once(state: StateDirectory) -> None:
    wrong = replace(machine(state), name="Not, a name", cpus=0, memory_mib=HOST_MEMORY_MIB + 1)
    with pytest.raises(InvalidArgument) as caught:
        check(wrong, state)
    assert [violation.field for violation in caught.value.violations] == ["name", "cpus", "memory_mib"]
    assert f"{HOST_MEMORY_MIB} MiB of this host" in caught.value.message


def test_all_of_the_host_s_memory_is_allowed(state: StateDirectory) -> None:
    check(replace(machine(state), memory_mib=HOST_MEMORY_MIB), state)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "kernel",
        "{state}/images/../../secret",
        "{state}/images/small/../../../secret",
        "{state}/images//small/kernel",
        "{state}/images/./small/kernel",
        "{state}/images/small/kernel\n",
        "{state}/images/small/kernel\0",
    ],
)
def test_a_path_that_is_not_plain_is_a_wrong_value(state: StateDirectory, path: str) -> None:
    boot = KernelBoot(path.format(state=state.path), "", "")
    with pytest.raises(InvalidArgument) as caught:
        check(replace(machine(state), kernel_boot=boot), state)
    assert [violation.field for violation in caught.value.violations] == ["kernel_boot.kernel"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/",
        "{state}",
        "{state}/store.sqlite",
        "{state}/images.old/x",
        "{state}/instances/{other}/disk.raw",
    ],
)
def test_a_path_elsewhere_is_refused(state: StateDirectory, path: str) -> None:
    path = path.format(state=state.path, other=OTHER_UID)
    boot, disk = KernelBoot(path, "", ""), Disk(path, DiskFormat.RAW, read_only=True)
    assert "does not lie in" in refused(replace(machine(state), kernel_boot=boot), state, "kernel_boot.kernel")
    boot = replace(machine(state).kernel_boot, initramfs=path)
    assert "does not lie in" in refused(replace(machine(state), kernel_boot=boot), state, "kernel_boot.initramfs")
    assert "does not lie in" in refused(replace(machine(state), disks=(disk,)), state, "disks[0].path")


def test_an_image_can_be_read_but_not_written(state: StateDirectory) -> None:
    disk = Disk(str(kernel(state)), DiskFormat.RAW, read_only=True)
    check(replace(machine(state), disks=(disk,)), state)
    written = replace(machine(state), disks=(disk, replace(disk, read_only=False)))
    assert "does not lie in" in refused(written, state, "disks[1].path")


@pytest.mark.parametrize("name", ["a,b", "a b", "a:b", "ä", "a=b", "-a,b"])
def test_names_that_mean_something_to_qemu_are_refused(state: StateDirectory, name: str) -> None:
    (state.images / "small" / name).write_bytes(b"x")
    boot = replace(machine(state).kernel_boot, initramfs=str(state.images / "small" / name))
    why = refused(replace(machine(state), kernel_boot=boot), state, "kernel_boot.initramfs")
    assert "other characters" in why


def test_a_missing_file_is_said_to_be_missing(state: StateDirectory) -> None:
    kernel(state).unlink()
    with pytest.raises(FailedPrecondition) as caught:
        check(machine(state), state)
    assert caught.value.reason == "FILE_MISSING"
    assert caught.value.message == f"kernel_boot.kernel: {kernel(state)} does not exist"


def link(path: Path, state: StateDirectory) -> None:
    path.symlink_to(secret(state))


def dangling_link(path: Path, state: StateDirectory) -> None:
    path.symlink_to(path.parent / "nowhere")


def hard_link(path: Path, state: StateDirectory) -> None:
    path.hardlink_to(secret(state))


def fifo(path: Path, state: StateDirectory) -> None:
    os.mkfifo(path)


def directory(path: Path, state: StateDirectory) -> None:
    path.mkdir()


def unix_socket(path: Path, state: StateDirectory) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def device(path: Path, state: StateDirectory) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device files")


def foreign_file(path: Path, state: StateDirectory) -> None:
    path.write_bytes(b"x")
    try:
        os.chown(path, 65534, -1)
    except PermissionError:
        pytest.skip("only root gives files away")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (link, "is a symbolic link"),
        (dangling_link, "is a symbolic link"),
        (hard_link, "has 2 hard links"),
        (fifo, "is not a regular file"),
        (directory, "is not a regular file"),
        (unix_socket, "is not a regular file"),
        (device, "is not a regular file"),
        (foreign_file, "belongs to user 65534"),
    ],
)
@pytest.mark.parametrize("field", ["kernel_boot.kernel", "kernel_boot.initramfs", "disks[0].path", "console_log"])
def test_what_is_no_plain_file_is_refused(  # type: ignore[no-untyped-def]
    state: StateDirectory, make, why: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(state.path)  # a socket's path must be short
    initramfs = state.images / "small" / "initramfs"
    initramfs.write_bytes(b"x")
    own = state.instance(UID)
    path = {
        "kernel_boot.kernel": kernel(state),
        "kernel_boot.initramfs": initramfs,
        "disks[0].path": own.disk,
        "console_log": own.console_log,
    }[field]
    path.unlink(missing_ok=True)
    make(path, state)
    boot = replace(machine(state).kernel_boot, initramfs=str(initramfs))
    assert why in refused(replace(machine(state), kernel_boot=boot), state, field)


@pytest.mark.parametrize("level", ["images", "image", "instances", "instance"])
def test_a_link_on_the_way_is_refused(state: StateDirectory, level: str) -> None:
    own = state.instance(UID).path
    at, field = {
        "images": (state.images, "kernel_boot.kernel"),
        "image": (kernel(state).parent, "kernel_boot.kernel"),
        "instances": (state.instances, "uid"),
        "instance": (own, "uid"),
    }[level]
    elsewhere = state.path.parent / "elsewhere"
    at.rename(elsewhere)
    at.symlink_to(elsewhere)
    assert "without following a link" in refused(machine(state), state, field)


def test_the_state_directory_itself_may_be_a_link(state: StateDirectory) -> None:
    elsewhere = state.path.parent / "elsewhere"
    state.path.rename(elsewhere)
    state.path.symlink_to(elsewhere)
    check(machine(state), state)


def qcow2(*, version: int = 3, backing_file_offset: int = 0, incompatible_features: int = 0) -> bytes:
    header = struct.pack(">4sIQI", b"QFI\xfb", version, backing_file_offset, 0)
    return header.ljust(72, b"\0") + struct.pack(">Q", incompatible_features)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "is not a qcow2 file"),
        (b"raw bytes", "is not a qcow2 file"),
        (qcow2(backing_file_offset=1), "names a backing file"),
        (qcow2(version=2, backing_file_offset=1 << 63), "names a backing file"),
        (qcow2(incompatible_features=4), "names an external data file"),
    ],
)
def test_a_qcow2_that_names_another_file_is_refused(state: StateDirectory, header: bytes, why: str) -> None:
    disk = state.instance(UID).disk
    disk.write_bytes(header)
    wrong = replace(machine(state), disks=(Disk(str(disk), DiskFormat.QCOW2),))
    assert why in refused(wrong, state, "disks[0].path")


@pytest.mark.parametrize("header", [qcow2(), qcow2(incompatible_features=3), qcow2(version=2, incompatible_features=4)])
def test_a_qcow2_that_stands_on_its_own_is_allowed(state: StateDirectory, header: bytes) -> None:
    disk = state.instance(UID).disk
    disk.write_bytes(header)
    check(replace(machine(state), disks=(Disk(str(disk), DiskFormat.QCOW2),)), state)
