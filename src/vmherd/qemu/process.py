"""A QEMU process as it is recorded, and how it is recognised again after the helper was restarted."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from vmherd.qemu.network.rules import Port

STDERR_TAIL_BYTES = 4096
STDERR_TAIL_LINES = 20
PID_MAX = 1 << 22
"""PID_MAX_LIMIT of Linux; proc_sys_kernel(5)."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Process:
    """A QEMU process: one that is about to start, one that runs, or one that ended."""

    uid: str
    name: str
    generation: int
    argv: tuple[str, ...]
    """QEMU's own words, without those of the programs that become QEMU."""
    unix_uid: int
    boot_id: str
    started_at_s: float
    """Seconds since the epoch."""
    ports: tuple[Port, ...] = ()
    """Its places on the host's networks."""
    pid: int | None = None
    start_ticks: int | None = None
    """When it started, in clock ticks since boot: with the boot id and the pid it names the process for good."""
    ended_at_s: float | None = None
    exit_code: int | None = None
    """None as well where the helper was not its parent."""
    signal: int | None = None
    stderr_tail: str = ""

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.ended_at_s is not None


_KINDS = get_type_hints(Process) | {"argv": tuple, "ports": tuple}


def temporary(path: Path) -> Path:
    """Where a record is written before it takes its name."""
    return path.with_suffix(".tmp")


def private(path: str, flags: int) -> int:
    """Opens a file that nobody else may read."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def write_record(path: Path, process: Process) -> None:
    """Writes a process's record in one step: a reader sees the old one or the new one.

    Raises:
        OSError: there is no room, or no directory.
    """
    with open(temporary(path), "w", opener=private) as file:
        json.dump(asdict(process), file)
        file.flush()
        os.fsync(file.fileno())
    temporary(path).replace(path)


def read_record(path: Path) -> Process:
    """The process of a record.

    Raises:
        ValueError: the file is not a record.
        OSError: it cannot be read.
    """
    try:
        fields = json.loads(path.read_bytes())
        ports = tuple(Port(**port) for port in fields["ports"])
        process = Process(**fields | {"argv": tuple(fields["argv"]), "ports": ports})
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a process: {error!r}") from error
    for name, kind in _KINDS.items():
        if not isinstance(getattr(process, name), kind):
            raise ValueError(f"{name} has the wrong type")
    if process.pid is not None and not 0 < process.pid <= PID_MAX:
        raise ValueError(f"{process.pid} is no pid")
    return process


def boot_id() -> str:
    """Which boot of the host this is."""
    return BOOT_ID.read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot, or None if there is none: field 22 of proc_pid_stat(5)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 2, the program's name, may hold spaces and parentheses; the last one closes it.
    return int(stat.rpartition(b")")[2].split()[22 - 3])


def open_pidfd(pid: int, ticks: int | None) -> int | None:
    """A pidfd of the process that got this pid at this time; None if it is gone, whoever has its pid now."""
    if start_ticks(pid) != ticks:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # The pid may have become another's since the first look. The pidfd cannot.
    if start_ticks(pid) == ticks:
        return pidfd
    os.close(pidfd)
    return None


def find_processes(last_words: Sequence[str], users: Container[int]) -> list[tuple[int, int]]:
    """Start ticks and pid of each process of these users whose command line ends with these words, the oldest first.

    Before them may be those of programs that are about to become this one. Others than these users may have the same.
    """
    wanted = b"\0" + b"".join(os.fsencode(word) + b"\0" for word in last_words)
    found = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            process = Path(f"/proc/{pid}")
            # The ticks come first: with them `open_pidfd` tells whether it is still the process that was looked at.
            ticks = start_ticks(pid) if process.stat().st_uid in users else None
            if ticks is not None and (b"\0" + (process / "cmdline").read_bytes()).endswith(wanted):
                found.append((ticks, pid))
    return sorted(found)


def stderr_tail(path: Path) -> str:
    """The last lines that QEMU wrote, without control characters: a guest can make QEMU write what it likes.

    Nothing where they cannot be read: its end has to be told all the same.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - STDERR_TAIL_BYTES))
            lines = file.read(STDERR_TAIL_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return ""
    printable = ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in lines)
    return "\n".join(list(printable)[-STDERR_TAIL_LINES:])
