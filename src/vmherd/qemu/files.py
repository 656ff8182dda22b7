"""Opens what a machine is given, checks it on the descriptor, and makes it the machine's own.

QEMU gets the descriptors and never sees a name, so what was checked is what it uses, whoever exchanges files meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmherd.model.errors import FailedPrecondition
from vmherd.model.layout import StateDirectory
from vmherd.model.machine import DiskFormat, Machine
from vmherd.qemu import policy, uids
from vmherd.qemu.policy import File


@dataclass(frozen=True)
class Owners:
    """Whose the things of machines are: of the controller, and where the helper is root, of a user for each machine."""

    controller: int
    """The controller's uid."""
    group: int
    """The controller's group (a gid)."""
    machines: range | None
    """The uids for machines; None where the helper is not root, and everything is its own."""

    def mode(self, mode: int) -> int:
        """A mode without what it has for the group, where the controller is the helper's own user and needs none."""
        return mode & ~0o070 if self.controller == os.geteuid() else mode

    @property
    def trusted(self) -> set[int]:
        """Who may have made a machine's files."""
        return {os.geteuid(), self.controller}


@contextlib.contextmanager
def opened(
    machine: Machine, state: StateDirectory, owners: Owners, others: Collection[int]
) -> Iterator[tuple[int, list[int]]]:
    """The uid that a machine runs as, and the descriptors of its files in the order of `policy.files`.

    The machine has passed `policy.check_values`. `others` are the uids of the other machines that run. Nothing is
    changed unless everything is as it should be.

    Raises:
        FailedPrecondition: a file is not there, or the host cannot open it now.
        PermissionDenied: a file is reached through a link, belongs to somebody else, or names another.
        ResourceExhausted: there is no uid left.
    """
    with contextlib.ExitStack() as stack:
        own = File("uid", state.instance(machine.uid).path, ())
        root = stack.enter_context(_descriptor(state.path, os.O_PATH | os.O_DIRECTORY))
        with _refusals(own), _parent(root, state, own) as instances:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            directory = stack.enter_context(_descriptor(own.path.name, flags, at=instances))
            uid = _uid(own, os.fstat(directory).st_uid, instances, owners, others)
        files = tuple(policy.files(machine, state))
        descriptors = []
        for file in files:
            with _refusals(file):
                descriptors.append(_open(root, state, file, owners, uid))
                stack.callback(os.close, descriptors[-1])
        if owners.machines:
            with _refusals(own):
                _give(directory, uid, owners, 0o770)
            for file, descriptor in zip(files, descriptors, strict=True):
                with _refusals(file):
                    if file.by_name:
                        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | stat.S_IROTH)
                    elif file.flags != policy.READ:
                        _give(descriptor, uid, owners, 0o660)
        yield uid, descriptors


@contextlib.contextmanager
def _refusals(file: File) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FailedPrecondition(
            f"{file.field}: {file.path} does not exist",
            reason="FILE_MISSING",
            metadata={"field": file.field, "path": file.path},
        ) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise file.refused(f"cannot be opened without following a link: {error.strerror}") from error
        raise FailedPrecondition(
            f"{file.field}: {file.path} cannot be used: {error.strerror}",
            reason="FILE_NOT_USABLE",
            metadata={"field": file.field, "path": file.path},
        ) from error


@contextlib.contextmanager
def _descriptor(path: str | Path, flags: int, *, at: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600, dir_fd=at)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _parent(root: int, state: StateDirectory, file: File) -> Iterator[int]:
    """The directory that a file is in, reached without following a link below the state directory."""
    with contextlib.ExitStack() as stack:
        for name in file.path.relative_to(state.path).parent.parts:
            root = stack.enter_context(_descriptor(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY, at=root))
        yield root


def _uid(own: File, owner: int, instances: int, owners: Owners, others: Collection[int]) -> int:
    """The uid of the machine whose state directory has this owner."""
    machines = owners.machines or range(0)
    if owner in machines and owner not in others:  # or somebody has given it the directory of another machine
        return owner
    if owner not in owners.trusted and owner not in machines:
        raise own.refused(f"belongs to user {owner}")
    if not machines:
        return owner
    with _descriptor(".", os.O_RDONLY | os.O_DIRECTORY, at=instances) as directory:
        return uids.lowest_free(machines, {*others, *uids.owners(directory), *uids.running(machines)})


def _open(root: int, state: StateDirectory, file: File, owners: Owners, uid: int) -> int:
    name = file.path.name
    with _parent(root, state, file) as directory:
        if file.made:
            with contextlib.suppress(FileExistsError), _descriptor(name, os.O_CREAT | os.O_EXCL, at=directory) as new:
                os.fchown(new, owners.controller, -1)
        # It is opened for use once it is known to be a file: opening a FIFO would wait, and a device may do something.
        with _descriptor(name, os.O_PATH | os.O_NOFOLLOW, at=directory) as found:
            status = os.fstat(found)
            # Somebody else's file that has a second name here for a moment, and for no longer, looks like one with a
            # single name. So of the helper's own files nothing is written, and only what everybody may read is read.
            public = file.flags == policy.READ and status.st_mode & stat.S_IROTH
            why = policy.objection(status, {owners.controller, uid, *((os.geteuid(),) if public else ())})
            if not why and file.format is DiskFormat.QCOW2:
                with open(f"/proc/self/fd/{found}", "rb") as contents:
                    why = policy.qcow2_objection(contents.read(policy.QCOW2_HEADER_BYTES))
            if why:
                raise file.refused(why)
            return os.open(f"/proc/self/fd/{found}", file.flags | os.O_CLOEXEC)


def _give(descriptor: int, uid: int, owners: Owners, mode: int) -> None:
    os.fchown(descriptor, uid, owners.group)
    os.fchmod(descriptor, owners.mode(mode))
