"""Whose files become, where the helper is root. What is refused, also without root, is in test_policy."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from vmherd.model.errors import FailedPrecondition, PermissionDenied, ResourceExhausted
from vmherd.model.layout import StateDirectory
from vmherd.model.machine import Disk, DiskFormat, KernelBoot, Machine
from vmherd.qemu import files
from vmherd.qemu.files import Owners

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")

UID = "6b1f3b0e-5f0c-4b54-9d3c-0123456789ab"
OTHER_UID = "00000000-0000-0000-0000-000000000000"
CONTROLLER, GROUP = 65533, 65532
MACHINES = range(1899990000, 1899990003)
OWNERS = Owners(CONTROLLER, GROUP, MACHINES)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    """A state directory as the controller makes it: all of it is its own, and nobody else's to read."""
    state = StateDirectory(tmp_path / "state")
    for directory in (state.images / "small", state.instance(UID).path, state.instance(OTHER_UID).path):
        directory.mkdir(parents=True)
    for name in ("kernel", "initramfs", "disk"):
        (state.images / "small" / name).write_bytes(b"x")
    for uid in (UID, OTHER_UID):
        state.instance(uid).disk.write_bytes(b"x")
    for path in (state.path, *state.path.rglob("*")):
        os.chown(path, CONTROLLER, GROUP)
        path.chmod(0o700 if path.is_dir() else 0o600)
    return state


def machine(state: StateDirectory, uid: str = UID) -> Machine:
    image = state.images / "small"
    disks = (
        Disk(str(state.instance(uid).disk), DiskFormat.RAW),
        Disk(str(image / "disk"), DiskFormat.RAW, read_only=True),
    )
    boot = KernelBoot(str(image / "kernel"), str(image / "initramfs"), "")
    return Machine(uid, "small", 1, 1, 128, boot, disks)


def opened(state: StateDirectory, uid: str = UID, *others: int, owners: Owners = OWNERS) -> int:
    with files.opened(machine(state, uid), state, owners, others) as (unix_uid, _):
        return unix_uid


def owner(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def everything(state: StateDirectory) -> dict[Path, tuple[int, int, int]]:
    return {path: owner(path) for path in (state.path, *state.path.rglob("*"))}


def test_what_a_machine_writes_is_its_user_s_and_the_controller_s_group_s(state: StateDirectory) -> None:
    before = everything(state)
    own, image = state.instance(UID), state.images / "small"
    assert opened(state) == MACHINES[0]
    changed = {path: is_ for path, is_ in everything(state).items() if before.get(path) != is_}
    assert changed == {
        own.path: (MACHINES[0], GROUP, 0o770),
        own.disk: (MACHINES[0], GROUP, 0o660),
        own.console_log: (MACHINES[0], GROUP, 0o660),
        # QEMU opens these two once more. It cannot get there but by the descriptor.
        image / "kernel": (CONTROLLER, GROUP, 0o604),
        image / "initramfs": (CONTROLLER, GROUP, 0o604),
    }


def test_without_a_controller_of_another_user_the_group_has_nothing(state: StateDirectory) -> None:
    for path in (state.path, *state.path.rglob("*")):
        os.chown(path, 0, 0)
    opened(state, owners=Owners(0, 0, MACHINES))
    assert owner(state.instance(UID).path) == (MACHINES[0], 0, 0o700)
    assert owner(state.instance(UID).disk) == (MACHINES[0], 0, 0o600)


def test_each_descriptor_is_open_for_what_qemu_does_with_it(state: StateDirectory) -> None:
    own, image = state.instance(UID), state.images / "small"
    before = set(os.listdir("/proc/self/fd"))
    with files.opened(machine(state), state, OWNERS, ()) as (_, descriptors):
        found = [
            (os.readlink(f"/proc/self/fd/{descriptor}"), os.get_inheritable(descriptor)) for descriptor in descriptors
        ]
        assert found == [
            (str(path), False)
            for path in (image / "kernel", image / "initramfs", own.disk, image / "disk", own.console_log)
        ]
        os.write(descriptors[2], b"written")
        os.write(descriptors[4], b"logged")
        for descriptor in (descriptors[0], descriptors[1], descriptors[3]):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(descriptor, b"never")
    assert set(os.listdir("/proc/self/fd")) == before
    with files.opened(machine(state), state, OWNERS, ()) as (_, descriptors):
        os.write(descriptors[4], b" and more")
    assert own.console_log.read_bytes() == b"logged and more"


def test_a_machine_keeps_its_user_until_its_files_are_gone(state: StateDirectory) -> None:
    assert opened(state) == MACHINES[0]
    assert opened(state, OTHER_UID) == MACHINES[1]
    assert opened(state) == MACHINES[0]
    for path in (state.instance(UID).disk, state.instance(UID).console_log):
        path.unlink()
    state.instance(UID).path.rmdir()
    new = "11111111-1111-1111-1111-111111111111"
    state.instance(new).path.mkdir()
    state.instance(new).disk.write_bytes(b"x")
    for path in (state.instance(new).path, state.instance(new).disk):
        os.chown(path, CONTROLLER, GROUP)
    assert opened(state, new) == MACHINES[0]
    with pytest.raises(FailedPrecondition, match=r"uid: .* does not exist"):
        opened(state)


def test_a_user_of_a_machine_that_runs_without_files_is_not_given_away(state: StateDirectory) -> None:
    assert opened(state, UID, MACHINES[0], MACHINES[1]) == MACHINES[2]
    with pytest.raises(ResourceExhausted):
        opened(state, OTHER_UID, MACHINES[0], MACHINES[1])


def test_the_directory_of_a_machine_that_runs_makes_nobody_its_user(state: StateDirectory) -> None:
    opened(state, OTHER_UID)
    state.instance(OTHER_UID).path.rename(state.path / "aside")
    state.instance(UID).path.rename(state.instance(OTHER_UID).path)
    (state.path / "aside").rename(state.instance(UID).path)
    before = everything(state)
    with pytest.raises(PermissionDenied, match=rf"disks\[0\].path: .* belongs to user {MACHINES[0]}"):
        opened(state, UID, MACHINES[0])
    assert everything(state) == before


@pytest.mark.parametrize("name", ["disk", "console_log"])
def test_a_file_of_another_machine_is_refused_and_nothing_changed(state: StateDirectory, name: str) -> None:
    path: Path = getattr(state.instance(UID), name)
    path.touch()
    os.chown(path, MACHINES[2], GROUP)
    before = everything(state)
    with pytest.raises(PermissionDenied, match=f"belongs to user {MACHINES[2]}"):
        opened(state)
    assert everything(state) == before


@pytest.mark.parametrize(
    ("name", "mode", "taken"),
    [("kernel", 0o644, True), ("kernel", 0o640, False), ("disk", 0o644, True), ("disk", 0o600, False)],
)
def test_a_file_of_root_is_read_where_everybody_may_read_it(
    state: StateDirectory, name: str, mode: int, taken: bool
) -> None:
    path = state.images / "small" / name
    os.chown(path, 0, 0)
    path.chmod(mode)
    before = everything(state)
    if taken:
        opened(state)
        assert owner(path) == (0, 0, mode)
    else:
        with pytest.raises(PermissionDenied, match=f"{name} belongs to user 0"):
            opened(state)
        assert everything(state) == before


@pytest.mark.parametrize("name", ["disk", "console_log"])
def test_a_file_of_root_is_never_written(state: StateDirectory, name: str) -> None:
    """A moment ago it may have had another name as well: that of a secret, or of a program."""
    path: Path = getattr(state.instance(UID), name)
    path.touch()
    os.chown(path, 0, 0)
    path.chmod(0o666)
    before = everything(state)
    with pytest.raises(PermissionDenied, match="belongs to user 0"):
        opened(state)
    assert everything(state) == before


def test_a_directory_of_a_stranger_is_refused(state: StateDirectory) -> None:
    os.chown(state.instance(UID).path, 12345, GROUP)
    with pytest.raises(PermissionDenied, match=r"uid: .* belongs to user 12345"):
        opened(state)
    assert owner(state.instance(UID).disk)[0] == CONTROLLER


def test_a_refused_machine_changes_nothing(state: StateDirectory) -> None:
    state.instance(UID).disk.unlink()
    before = everything(state)
    with pytest.raises(FailedPrecondition):
        opened(state)
    assert everything(state) == before


def test_what_the_host_lacks_is_no_fault_of_the_file(state: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    opens = os.open

    def full(path: str, flags: int, *words: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opens(path, flags, *words, **more)

    before = everything(state)
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(FailedPrecondition, match="No space left on device") as caught:
        opened(state)
    assert caught.value.reason == "FILE_NOT_USABLE"
    assert everything(state) == before
