"""What the helper accepts. It does not trust its caller: every value and every path is checked here again."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vmherd.model.errors import FailedPrecondition, FieldViolation, InvalidArgument, PermissionDenied
from vmherd.model.layout import StateDirectory
from vmherd.model.machine import DiskFormat, Machine, check_machine

QCOW2_MAGIC = b"QFI\xfb"
QCOW2_EXTERNAL_DATA_FILE = 1 << 2

# None of these characters has a meaning to QEMU. A comma or a space in -initrd would begin another file, were the
# kernel a multiboot one.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class _File:
    """A file of a machine and the directories that it may lie in."""

    field: str
    path: str
    roots: tuple[Path, ...]
    format: DiskFormat = DiskFormat.RAW
    made_by_qemu: bool = False

    def refused(self, why: str) -> PermissionDenied:
        return PermissionDenied(
            f"{self.field}: {self.path} {why}",
            reason="PATH_REFUSED",
            metadata={"field": self.field, "path": self.path},
        )


def check_values(machine: Machine, *, state: StateDirectory, host_memory_mib: int) -> None:
    """Refuses a machine by what its description says, without a look at any file.

    What the guest only reads may lie in the image directory or in the instance's own; what it writes, only in its own.

    Raises:
        InvalidArgument: values are wrong, or the memory is more than the host has.
        PermissionDenied: a file lies elsewhere.
    """
    violations = list(check_machine(machine))
    if machine.memory_mib > host_memory_mib:
        description = f"must be at most the {host_memory_mib} MiB of this host, is {machine.memory_mib}"
        violations.append(FieldViolation("memory_mib", description))
    if violations:
        raise InvalidArgument.of(violations)
    for file in _files(machine, state):
        if not any(PurePosixPath(file.path).is_relative_to(root) for root in file.roots):
            raise file.refused(f"does not lie in {' or '.join(map(str, file.roots))}")
        if not all(map(_PLAIN_NAME.fullmatch, Path(file.path).relative_to(state.path).parts)):
            raise file.refused(f"has a name below {state.path} with other characters than A-Z a-z 0-9 . _ + -")


def check_files(machine: Machine, *, state: StateDirectory) -> None:
    """Refuses a machine that passed `check_values` by what its files are.

    QEMU opens them again by their names: who can exchange them in between owns the state directory and holds
    QEMU's control socket, so gains nothing by it.

    Raises:
        FailedPrecondition: a file is not there.
        PermissionDenied: a file is reached through a link, or is not a plain file that names no other.
    """
    owners = {os.geteuid(), state.path.stat().st_uid}
    for file in _files(machine, state):
        try:
            with _opened(state.path, Path(file.path).relative_to(state.path)) as descriptor:
                if why := _objection(descriptor, file.format, owners):
                    raise file.refused(why)
        except FileNotFoundError as error:
            if not file.made_by_qemu:
                raise FailedPrecondition(
                    f"{file.field}: {file.path} does not exist",
                    reason="FILE_MISSING",
                    metadata={"field": file.field, "path": file.path},
                ) from error
        except OSError as error:
            raise file.refused(f"cannot be reached without following a link: {error.strerror}") from error


def _files(machine: Machine, state: StateDirectory) -> Iterator[_File]:
    own = state.instance(machine.uid)
    to_read, to_write = (state.images, own.path), (own.path,)
    yield _File("kernel_boot.kernel", machine.kernel_boot.kernel, to_read)
    if machine.kernel_boot.initramfs:
        yield _File("kernel_boot.initramfs", machine.kernel_boot.initramfs, to_read)
    for index, disk in enumerate(machine.disks):
        yield _File(f"disks[{index}].path", disk.path, to_read if disk.read_only else to_write, disk.format)
    yield _File("console_log", str(own.console_log), to_write, made_by_qemu=True)


@contextlib.contextmanager
def _opened(root: Path, below: Path) -> Iterator[int]:
    """An `O_PATH` descriptor of a file, reached without following a link below `root`."""
    with contextlib.ExitStack() as stack:
        at = os.open(root, os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY)
        stack.callback(os.close, at)
        for name in below.parts:
            # With O_PATH this opens a link itself: `_objection` or the next step, which asks for a directory, sees it.
            at = os.open(name, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=at)
            stack.callback(os.close, at)
        yield at


def _objection(descriptor: int, format_: DiskFormat, owners: set[int]) -> str:
    """What is wrong with a file, or nothing."""
    status = os.fstat(descriptor)
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_nlink != 1:
        return f"has {status.st_nlink} hard links; a copy will do"
    if status.st_uid not in owners:
        return f"belongs to user {status.st_uid}"
    return _qcow2_objection(descriptor) if format_ is DiskFormat.QCOW2 else ""


def _qcow2_objection(descriptor: int) -> str:
    """Why a file is no qcow2 that stands on its own: QEMU would open what it names, wherever that is.

    The header: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt
    """
    with open(f"/proc/self/fd/{descriptor}", "rb") as file:
        header = file.read(80)
    if not header.startswith(QCOW2_MAGIC):
        return "is not a qcow2 file"
    version, backing_file, incompatible_features = header[4:8], header[8:16], header[72:80]
    if any(backing_file):
        return "names a backing file"
    if int.from_bytes(version, "big") > 2 and int.from_bytes(incompatible_features, "big") & QCOW2_EXTERNAL_DATA_FILE:
        return "names an external data file"
    return ""
