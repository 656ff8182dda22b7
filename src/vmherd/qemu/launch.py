"""How QEMU comes to be executed: the programs that make a process less than the helper, and then become QEMU.

They are util-linux's, and systemd's where it runs the host; each executes the next. The pid stays the same, and no
Python runs between fork and exec. A machine has no mount or IPC namespace of its own: that would take CAP_SYS_ADMIN,
with which the helper could do anything.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

from vmherd.host.accelerator import KVM_DEVICE, Accelerator
from vmherd.model.machine import Machine
from vmherd.qemu.process import private

SYSTEMD = Path("/run/systemd/system")
"""Where systemd runs the host: sd_booted(3)."""

FILES_MAX = 4096
"""Of a machine: its disks, and each connection through a user-mode network."""
THREADS_MAX = 256
"""Of a machine, beside one for each CPU: for disks, for the monitor, for translating."""
MEMORY_OVERHEAD_MIB = 1024
"""Of QEMU's own beside the guest's memory, up to half of it for translated code."""


def as_user(uid: int, accelerator: Accelerator) -> tuple[str, ...]:
    """The words that make root a user without any rights, in kvm's group alone where KVM is used."""
    group = _kvm_group() if accelerator == "kvm" else None
    return (
        *("setpriv", f"--reuid={uid}", f"--regid={uid}", f"--groups={group}" if group else "--clear-groups"),
        *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"),
    )


def chain(machine: Machine, uid: int, accelerator: Accelerator) -> tuple[str, ...]:
    """The words before QEMU's where the helper is root."""
    return (*(_scope(machine) if SYSTEMD.exists() else ()), *_limits(machine), *as_user(uid, accelerator))


def _scope(machine: Machine) -> tuple[str, ...]:
    """A cgroup with the machine's limits. It is not the helper's, so the end of the helper's unit does not touch it."""
    properties = {
        "MemoryMax": f"{machine.memory_mib + MEMORY_OVERHEAD_MIB}M",
        "CPUQuota": f"{100 * (machine.cpus + 1)}%",
        "TasksMax": machine.cpus + THREADS_MAX,
        # When the host goes down, what has to stop machines in good order is stopped before them.
        "Before": "vmherd-qemu.service vmherd-guests.service",
    }
    return (
        *("systemd-run", "--scope", "--quiet", "--collect", "--slice=vmherd-machines.slice"),
        *(f"--unit=vmherd-{machine.uid}-{machine.generation}", f"--description=vmherd: {machine.name}"),
        *(f"--property={name}={value}" for name, value in properties.items()),
        "--",
    )


def _limits(machine: Machine) -> tuple[str, ...]:
    files = _at_most(FILES_MAX, resource.RLIMIT_NOFILE)
    threads = _at_most(machine.cpus + THREADS_MAX, resource.RLIMIT_NPROC)
    return ("prlimit", "--core=0", f"--nofile={files}", f"--nproc={threads}", "--")


def _at_most(wanted: int, kind: int) -> int:
    """A limit, lowered to the helper's own, which it has no right to exceed."""
    _, hard = resource.getrlimit(kind)
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def _kvm_group() -> int | None:
    """The group that may use KVM; None where there is no such group, or everybody may, or root's alone."""
    with contextlib.suppress(FileNotFoundError):
        status = KVM_DEVICE.stat()
        if status.st_mode & stat.S_IRWXG and not status.st_mode & stat.S_IWOTH:
            return status.st_gid or None
    return None


@contextlib.contextmanager
def listening(path: Path, group: int, mode: int) -> Iterator[int]:
    """The descriptor of a socket that takes connections already: nobody has to wait for QEMU to make it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        os.chown(path, -1, group)
        path.chmod(mode)
        listener.listen(1)  # before this, whoever connects is refused
        yield listener.fileno()


def spawn(words: tuple[str, ...], descriptors: Collection[int], stderr_path: Path) -> subprocess.Popen[bytes]:
    """Executes a command line that inherits these descriptors.

    Raises:
        OSError: the first program cannot be executed.
    """
    with open(stderr_path, "wb", opener=private) as stderr:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=descriptors,
            cwd="/",
            env={"LC_ALL": "C"},
            umask=0o077,
            start_new_session=True,  # no signal of a terminal or of the helper's end reaches it
        )
