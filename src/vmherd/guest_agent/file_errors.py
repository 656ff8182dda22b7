"""What can go wrong with a file in the guest, told by the texts that the agent and the guest's programs give.

::

    AgentError
     └── FileError            it is about one file of the guest
          ├── FileMissing     there is no such file, or no folder to put it in
          ├── FileForbidden   the agent, or its program, may not
          ├── FileUnsuitable  it is there and is of another kind: a folder, a device, on a read-only file system
          ├── GuestFull       the guest has no room, or no descriptors
          └── FileChanged     what arrived is not what the file holds: it changed meanwhile, or was damaged
"""

from __future__ import annotations

from typing import NoReturn

from vmherd.guest_agent.errors import AgentError, CommandFailed


class FileError(AgentError):
    """Something about the file at `path` in the guest."""

    def __init__(self, message: str, *, path: str, command: str, elapsed_s: float = 0.0) -> None:
        super().__init__(message, command=command, elapsed_s=elapsed_s)
        self.path = path


class FileMissing(FileError):
    """There is no such file, or no folder to put it in."""


class FileForbidden(FileError):
    """The agent may not read or write there."""


class FileUnsuitable(FileError):
    """What is there is of another kind, or cannot be changed."""


class GuestFull(FileError):
    """The guest has no room for it."""


class FileChanged(FileError):
    """What arrived is not what the file holds."""


# The agent, dash, busybox, glibc, musl and Windows say the same in words of their own.
_KINDS: dict[str, type[FileError]] = {
    "No such file or directory": FileMissing,
    "The system cannot find the file specified": FileMissing,
    "The system cannot find the path specified": FileMissing,
    "Directory nonexistent": FileMissing,
    "nonexistent directory": FileMissing,
    "Permission denied": FileForbidden,
    "Operation not permitted": FileForbidden,
    "Access is denied": FileForbidden,
    "Is a directory": FileUnsuitable,
    "Not a regular file": FileUnsuitable,
    "Not a directory": FileUnsuitable,
    "Directory not empty": FileUnsuitable,
    "File exists": FileUnsuitable,
    "Read-only file system": FileUnsuitable,
    "Text file busy": FileUnsuitable,
    "File name too long": FileUnsuitable,
    "Filename too long": FileUnsuitable,
    "Too many levels of symbolic links": FileUnsuitable,
    "Symbolic link loop": FileUnsuitable,
    "No such device or address": FileUnsuitable,
    "Invalid argument": FileUnsuitable,
    "No space left on device": GuestFull,
    "Disk quota exceeded": GuestFull,
    "Quota exceeded": GuestFull,
    "File too large": GuestFull,
    "Too many open files": GuestFull,
    "No file descriptors available": GuestFull,
    "There is not enough space on the disk": GuestFull,
}


def explained(error: CommandFailed, path: str) -> AgentError:
    """The FileError that the agent's own text stands for, or the error itself where it stands for none."""
    why, kind = _reason(error.desc)
    if kind is None:
        return error
    return kind(f"{path}: {why}", path=path, command=error.command, elapsed_s=error.elapsed_s)


def refuse(said: str, path: str) -> NoReturn:
    """Raises the error for what a program of the guest said on its standard error."""
    why, kind = _reason(said)
    line = why if kind is None or path in _first_line(said) else _first_line(said)
    if kind is None:
        raise CommandFailed("GenericError", f"{path}: {line or 'no reason given'}", command="guest-exec", elapsed_s=0)
    raise kind(f"{path}: {line}", path=path, command="guest-exec")


def _reason(said: str) -> tuple[str, type[FileError] | None]:
    """The end of the first line, which gives the reason: what comes before may be a file's name, of any content."""
    line = _first_line(said)
    why = line.rpartition(": ")[2].rstrip(".")
    return (why, _KINDS[why]) if why in _KINDS else (line, None)


def _first_line(said: str) -> str:
    return next((line.strip() for line in said.splitlines() if line.strip()), "")
