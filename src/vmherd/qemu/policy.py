"""What the helper accepts. It does not trust its caller: every value and every path is checked here again."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vmherd.model.errors import FieldViolation, InvalidArgument, PermissionDenied
from vmherd.model.layout import StateDirectory
from vmherd.model.machine import DiskFormat, Machine, check_machine

READ, WRITE, APPEND = os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND

QCOW2_HEADER_BYTES = 80
QCOW2_MAGIC = b"QFI\xfb"
QCOW2_EXTERNAL_DATA_FILE = 1 << 2

# What every program can read in a log and nobody takes for anything else.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class File:
    """A file of a machine: which field names it, the directories that it may lie in, and what QEMU does to it."""

    field: str
    path: Path
    roots: tuple[Path, ...]
    flags: int = READ
    format: DiskFormat = DiskFormat.RAW
    by_name: bool = False
    """QEMU opens it once more, so that its user must be able to read it."""
    made: bool = False
    """It is made where it is missing."""

    def refused(self, why: str) -> PermissionDenied:
        """The error that says why this file is not taken."""
        return PermissionDenied(
            f"{self.field}: {self.path} {why}",
            reason="PATH_REFUSED",
            metadata={"field": self.field, "path": self.path},
        )


def files(machine: Machine, state: StateDirectory) -> Iterator[File]:
    """The files of a machine, in the order in which `command_line.Descriptors` has them.

    What the guest only reads may lie in the image directory or in the instance's own; what it writes, only in its own.
    """
    own = state.instance(machine.uid)
    to_read, to_write, boot = (state.images, own.path), (own.path,), machine.kernel_boot
    yield File("kernel_boot.kernel", Path(boot.kernel), to_read, by_name=True)
    if boot.initramfs:
        yield File("kernel_boot.initramfs", Path(boot.initramfs), to_read, by_name=True)
    for index, disk in enumerate(machine.disks):
        roots, flags = (to_read, READ) if disk.read_only else (to_write, WRITE)
        yield File(f"disks[{index}].path", Path(disk.path), roots, flags, disk.format)
    # The last, for it is made where it is missing, and nothing is to change before the others were found in order.
    yield File("console_log", own.console_log, to_write, APPEND, made=True)


def check_values(machine: Machine, *, state: StateDirectory, host_memory_mib: int) -> None:
    """Refuses a machine by what its description says, without a look at any file.

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
    for file in files(machine, state):
        if not any(PurePosixPath(file.path).is_relative_to(root) for root in file.roots):
            raise file.refused(f"does not lie in {' or '.join(map(str, file.roots))}")
        if not all(map(_PLAIN_NAME.fullmatch, file.path.relative_to(state.path).parts)):
            raise file.refused(f"has a name below {state.path} with other characters than A-Z a-z 0-9 . _ + -")


def objection(status: os.stat_result, owners: Collection[int]) -> str:
    """What is wrong with a file that is open, or nothing. Its owner may be one of these uids."""
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_nlink != 1:
        return f"has {status.st_nlink} hard links; a copy will do"
    if status.st_uid not in owners:
        return f"belongs to user {status.st_uid}"
    return ""


def qcow2_objection(header: bytes) -> str:
    """Why a file is no qcow2 that stands on its own: QEMU would open what it names, wherever that is.

    The header: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt
    """
    if not header.startswith(QCOW2_MAGIC):
        return "is not a qcow2 file"
    version, backing_file, incompatible_features = header[4:8], header[8:16], header[72:80]
    if any(backing_file):
        return "names a backing file"
    if int.from_bytes(version, "big") > 2 and int.from_bytes(incompatible_features, "big") & QCOW2_EXTERNAL_DATA_FILE:
        return "names an external data file"
    return ""
