"""Copying between this side and a guest as `cp` does it, whatever the way to the guest's files.

A target that is a folder gets the source in it, under the source's name; any other target becomes the source. A source
that ends in `/.` means what is in the folder. A folder is copied only if asked to, and merged into one of the same
name. Folders that would lead to the target are not made.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from vmherd.cli import local_archives
from vmherd.cli.report import printable
from vmherd.guest_agent.files import FileDescription, FileDigest
from vmherd.model.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, VmherdError

STDIO = "-"
PIECE_BYTES = 256 << 10

_GUEST_SIDE = re.compile(r"([a-z](?:[-a-z0-9]{0,61}[a-z0-9])?)?:(.*)", re.DOTALL)
_ABSOLUTE = re.compile(r"/|[A-Za-z]:[\\/]")

_LOCAL_ERRORS: dict[type[OSError], type[VmherdError]] = {
    FileNotFoundError: NotFound,
    PermissionError: PermissionDenied,
}


class Files(Protocol):
    """The files of one guest. Every method raises `VmherdError` where it fails."""

    def describe(self, path: str) -> FileDescription:
        """What is at a path.

        Raises:
            NotFound: nothing is.
        """

    def read(self, path: str, *, archive: bool) -> Generator[FileDescription | bytes | FileDigest]:
        """A file, or a folder as an archive: its description, its bytes, their digest."""

    def write(
        self, path: str, pieces: Iterable[bytes], *, archive: bool, mode: int | None, size_bytes: int | None
    ) -> FileDigest:
        """Writes a file, or unpacks an archive into a folder."""


@dataclass(frozen=True)
class Place:
    """One side of a copy: a path on this side, or in a guest, whose name may be left out where there is but one."""

    path: str
    is_guest: bool
    guest: str = ""


@dataclass
class Copied:
    """What was copied, and what was left out of it, each with its reason."""

    digest: FileDigest
    left_out: list[str] = field(default_factory=list)


def place(text: str) -> Place:
    """`NAME:/path` or `:/path` is a guest's, anything else is of this side.

    Raises:
        InvalidArgument: it names a guest, and no absolute path.
    """
    found = _GUEST_SIDE.fullmatch(text)
    if found is None:
        return Place(text, is_guest=False)
    if not _ABSOLUTE.match(found[2]):
        raise InvalidArgument(
            f"{text!r}: a path in a guest is absolute, as in {found[1] or ''}:/{found[2]}; "
            f"a file of this side with a colon in its name is ./{text}"
        )
    return Place(found[2], is_guest=True, guest=found[1] or "")


def copy(source: Place, target: Place, files: Files, *, recursive: bool) -> Copied:
    """Copies between the sides; one of both is the guest, whose files are `files`.

    Raises:
        VmherdError: what `files` raises, and what is wrong on this side.
    """
    try:
        if source.is_guest:
            return _fetch(source.path, target.path, files, recursive=recursive)
        return _send(source.path, target.path, files, recursive=recursive)
    except OSError as error:
        raise _local_error(error) from error


def _send(source: str, target: str, files: Files, *, recursive: bool) -> Copied:
    if source == STDIO:
        with _progress("standard input", None) as advance:
            # gRPC reads in a thread of its own. One that held the buffer's lock would abort an interrupted Python.
            stdin: Any = sys.stdin.buffer
            pieces = _pieces(getattr(stdin, "raw", stdin), advance)
            return Copied(files.write(target, pieces, archive=recursive, mode=None, size_bytes=None))
    path = Path(source)
    facts = path.stat()
    is_folder = stat.S_ISDIR(facts.st_mode)
    if is_folder and not recursive:
        raise FailedPrecondition(f"{source} is a folder; add -r", reason="IS_FOLDER")
    target = _inside_if(_is_folder_in_guest(files, target), target, source, contents=is_folder)
    if is_folder:
        left_out: list[str] = []
        with _progress(source, None) as advance:
            pieces = _counted(local_archives.pack(path, left_out), advance)
            return Copied(files.write(target, pieces, archive=True, mode=None, size_bytes=None), left_out)
    is_regular = stat.S_ISREG(facts.st_mode)
    # A file without blocks is empty, or one of /proc and /sys that has no size of its own.
    size_bytes = facts.st_size if is_regular and facts.st_blocks else None
    mode = stat.S_IMODE(facts.st_mode) if is_regular else None
    with path.open("rb", buffering=0) as file, _progress(source, size_bytes) as advance:
        return Copied(files.write(target, _pieces(file, advance), archive=False, mode=mode, size_bytes=size_bytes))


def _fetch(source: str, target: str, files: Files, *, recursive: bool) -> Copied:
    is_folder = recursive and files.describe(source).is_folder
    if target != STDIO:
        target = _inside_if(Path(target).is_dir(), target, source, contents=is_folder)
    with contextlib.closing(files.read(source, archive=is_folder)) as parts:
        description = next(parts)
        if not isinstance(description, FileDescription):
            raise _unexpected_end()
        if target == STDIO:
            digest = _received(parts, description, sys.stdout.buffer)
            sys.stdout.flush()
            return Copied(digest)
        path = Path(target)
        if not is_folder:
            with _replacing(path, description.mode) as file:
                return Copied(_received(parts, description, file))
        if path.exists() and not path.is_dir():
            raise FailedPrecondition(f"{target} is there and no folder", reason="LOCAL_FILE")
        # Nothing is unpacked before the guest has checked all of it.
        with tempfile.TemporaryFile(dir=path.absolute().parent) as archive:
            digest = _received(parts, description, archive)
            archive.seek(0)
            return Copied(digest, local_archives.unpack(archive, path))


def _inside_if(is_folder: bool, target: str, source: str, *, contents: bool) -> str:
    """The target, or a name in it where it is a folder, or is meant as one."""
    name = posixpath.basename(source.rstrip("/"))
    if contents and name in ("", ".", ".."):
        return target
    if is_folder:
        return posixpath.join(target, name)
    if target.endswith("/") and not contents:
        raise NotFound(f"there is no folder {target}", reason="FOLDER_NOT_FOUND")
    return target.rstrip("/") or target


def _is_folder_in_guest(files: Files, path: str) -> bool:
    try:
        return files.describe(path).is_folder
    except NotFound as error:
        if error.reason != "GUEST_FILE_NOT_FOUND":
            raise
        return False


def _received(
    parts: Iterator[FileDescription | bytes | FileDigest], description: FileDescription, file: BinaryIO
) -> FileDigest:
    """Writes what comes, and gives the digest that ends it."""
    with _progress(description.path, description.size_bytes) as advance:
        for part in parts:
            if isinstance(part, FileDigest):
                return part
            if isinstance(part, bytes):
                file.write(part)
                advance(len(part))
    raise _unexpected_end()


@contextlib.contextmanager
def _replacing(path: Path, mode: int | None) -> Iterator[BinaryIO]:
    """A file that gets its name when the context is left without an error; a device or a pipe is written to as it is.

    A link stays one to the new file. The mode is the guest's within our umask, and never a special one.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    unfinished = target.with_name(f".vmherd-{secrets.token_hex(8)}")
    permissions = 0o666 if mode is None else mode & 0o777
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, permissions | 0o200), "wb") as file:
            yield file
        if not permissions & 0o200:
            unfinished.chmod(unfinished.stat().st_mode & ~0o200)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _pieces(file: io.RawIOBase, advance: Callable[[int], None]) -> Iterator[bytes]:
    return _counted(iter(lambda: file.read(PIECE_BYTES) or b"", b""), advance)


def _counted(pieces: Iterable[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        advance(len(piece))


@contextlib.contextmanager
def _progress(name: str, size_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on standard error if that is a terminal; gives what tells it of bytes."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(escape(printable(name)), total=size_bytes)
        yield lambda count: bar.advance(task, count)


def _local_error(error: OSError) -> VmherdError:
    kind = _LOCAL_ERRORS.get(type(error), FailedPrecondition)
    where = error.filename or "on this side"
    return kind(f"{where}: {error.strerror or error}", reason="LOCAL_FILE")


def _unexpected_end() -> Aborted:
    return Aborted("the copy ended in the middle", reason="COPY_UNFINISHED")
