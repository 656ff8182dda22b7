"""What a herd leaves on its host: processes, sockets, network interfaces and files."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vmherd.model.layout import Herd, StateDirectory


def all_of(herd: Herd) -> Iterator[str]:
    """Everything that should be gone once the herd has ended and its instances are deleted, for people."""
    yield from (f"process {pid} ({name})" for pid, name in processes(herd.path).items())
    yield from (f"socket {path}" for path in _sockets(herd.path))
    yield from (f"file {path}" for path in _files(herd))


def processes(directory: Path) -> dict[int, str]:
    """The other processes that name something in this directory on their command line, or have a file there open.

    QEMU is only given descriptors, and the others may be found before they have opened anything.
    """
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        words = _words(process)
        used = (*words, *_open_files(process))
        if process.name != str(os.getpid()) and any(f"{directory}/" in text for text in used):
            found[int(process.name)] = Path(words[0]).name
    return found


def _words(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return [""]


def _open_files(process: Path) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or another user's
        for descriptor in os.listdir(process / "fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since
                yield os.readlink(process / "fd" / descriptor)


def interfaces() -> set[str]:
    """The host's network interfaces, for people."""
    return {f"interface {name}" for _, name in socket.if_nameindex()}


def _sockets(directory: Path) -> list[str]:
    paths = (line.rpartition(" ")[2] for line in Path("/proc/net/unix").read_text().splitlines())
    return [path for path in paths if path.startswith(f"{directory}/")]


def _files(herd: Herd) -> list[Path]:
    """The files that are neither there for the next start nor a record of the last one."""
    state = StateDirectory(herd.path / "state")
    kept = {herd.settings, herd.logs, herd.token, state.images, state.accelerators}
    return [
        path
        for path in sorted(herd.path.rglob("*"))
        if not path.is_dir()
        and kept.isdisjoint((path, *path.parents))
        and not path.name.startswith(state.store.name)  # SQLite has more than one
    ]
