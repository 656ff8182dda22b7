"""Tar archives on this side: folders packed as a stream, and archives of a guest unpacked with all distrust.

An archive is looked through before anything of it is unpacked. A member that would come to lie elsewhere refuses the
whole archive. A link that leads out of the folder, and what is neither a file nor a folder nor a link, is left out and
named. The rules need no file system: no member lies below a link of the archive, and a link's target goes up only at
its start and no further than the folder, so by induction every link ends inside.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import tarfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from vmherd.model.errors import Aborted, FailedPrecondition

PIECE_BYTES = 256 << 10
_ENCODING = "utf-8", "surrogateescape"
_SHOWN = 200
_TIME_MAX_S = 1 << 33

MEMBERS_MAX = 1_000_000


def pack(folder: Path, left_out: list[str]) -> Iterator[bytes]:
    """The archive of what is in a folder, piece by piece: modes, times and links, no owners. Adds to `left_out`.

    Raises:
        OSError: something cannot be read.
        FailedPrecondition: a file became shorter while it was read.
    """
    with tarfile.TarFile(os.devnull, mode="w") as tar:  # it knows which files are hard links of each other
        for path in _below(folder):
            name = path.relative_to(folder).as_posix()
            member = tar.gettarinfo(path, name)
            if member is None or not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
                left_out.append(f"{name}: not a file, a folder or a link")
                continue
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            yield member.tobuf(tarfile.GNU_FORMAT, *_ENCODING)  # busybox lacks the long names of PAX
            if member.isreg():
                yield from _content(path, member.size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def unpack(archive: BinaryIO, folder: Path) -> list[str]:
    """Unpacks an archive into a folder, which is made if it is missing; gives what was left out, and why.

    Raises:
        Aborted: the archive is damaged, or it is not one that leaves everything else alone; nothing was unpacked.
        OSError: something cannot be written.
    """
    left_out: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=archive, mode="r:", encoding=_ENCODING[0], errors=_ENCODING[1]) as tar:
            members = _checked(tar, left_out)
            made = {""} if _made(folder) else set()
            for member in members:
                if _name(member) and _extract(tar, member, folder):
                    made.add(_name(member))
            for member in reversed(members):  # a folder's own mode and time come after what is in it
                if member.isdir() and _name(member) in made:
                    _finish(folder / _name(member), member)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _refused(f"it is damaged: {error}") from error
    return [f"{name[:_SHOWN]}: {why}" for name, why in left_out.items()]


def _checked(members: Iterable[tarfile.TarInfo], left_out: dict[str, str]) -> list[tarfile.TarInfo]:
    """The members to unpack; adds the others to `left_out`."""
    links: set[str] = set()
    files: set[str] = set()
    kept = []
    for count, member in enumerate(members):
        name, shown = _name(member), repr(member.name[:_SHOWN])
        parts = name.split("/")
        if count >= MEMBERS_MAX:
            raise _refused(f"it has more than {MEMBERS_MAX} members")
        if name.startswith("/") or ".." in parts or (not name and not member.isdir()):
            raise _refused(f"its member {shown} would lie outside of the folder")
        if any("/".join(parts[:end]) in links for end in range(1, len(parts) + 1)):
            raise _refused(f"its member {shown} would lie behind a link")
        if member.issparse():
            raise _refused(f"its member {shown} has holes, so it could become larger than what has arrived")
        if why := _why_not(member, name, files):
            left_out[name] = why
        else:
            kept.append(member)
            files.update({name} if member.isreg() or member.islnk() else ())
        links.update({name} if member.issym() else ())
    return kept


def _why_not(member: tarfile.TarInfo, name: str, files: Collection[str]) -> str:
    """Why a member is left out; empty if it is not."""
    if member.issym() and not _stays_inside(name, member.linkname):
        return f"a link that leads out of the folder, to {member.linkname[:_SHOWN]}"
    if member.islnk() and posixpath.normpath(member.linkname) not in files:
        return f"another name of a file that is not in the folder, {member.linkname[:_SHOWN]}"
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return "not a file, a folder or a link"
    return ""


def _stays_inside(name: str, target: str) -> bool:
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and ".." not in parts[ups:] and ups <= name.count("/")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> bool:
    """Makes a member's file, link or folder; False for a folder that is there already."""
    path = _inside(folder, member)
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        return _made(path)
    # What is there goes first: to write through a link, or into a file that has other names, would change those.
    path.unlink(missing_ok=True)
    if member.issym():
        path.symlink_to(member.linkname)
    elif member.islnk():
        path.hardlink_to(folder / posixpath.normpath(member.linkname))
    elif source := tar.extractfile(member):
        with source, open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            shutil.copyfileobj(source, file, PIECE_BYTES)
        _finish(path, member)
    return True


def _inside(folder: Path, member: tarfile.TarInfo) -> Path:
    """Where a member goes: links that lie in the folder from before lead nowhere else either."""
    path = folder / _name(member)
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise FailedPrecondition(f"{path.parent} is a link out of {folder}; remove it first", reason="LOCAL_FILE")
    return path


def _finish(path: Path, member: tarfile.TarInfo) -> None:
    path.chmod(member.mode & 0o777 & ~_umask())
    modified_s = member.mtime if 0 <= member.mtime < _TIME_MAX_S else 0
    os.utime(path, (modified_s, modified_s))


def _made(folder: Path) -> bool:
    """Whether the folder had to be made."""
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def _name(member: tarfile.TarInfo) -> str:
    """The member's name without dots and doubled slashes; empty for the top itself."""
    absolute = "/" if member.name.startswith("/") else ""
    return absolute + "/".join(part for part in member.name.split("/") if part not in ("", "."))


def _refused(why: str) -> Aborted:
    return Aborted(f"the guest's archive is refused: {why}; nothing was unpacked", reason="ARCHIVE_REFUSED")


def _below(folder: Path) -> Iterator[Path]:
    """The folder itself and all that is in it, each folder before what it holds."""

    def fail(error: OSError) -> None:
        raise error

    for top, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        yield Path(top)
        links = [name for name in folders if Path(top, name).is_symlink()]  # `os.walk` does not go into them
        yield from (Path(top, name) for name in sorted(names + links))


def _content(path: Path, size_bytes: int) -> Iterator[bytes]:
    """Just as many bytes of a file as its header has announced, and zeros up to a whole block."""
    left_bytes = size_bytes
    with path.open("rb") as file:
        while left_bytes:
            piece = file.read(min(left_bytes, PIECE_BYTES))
            if not piece:
                raise FailedPrecondition(f"{path} became shorter while it was read", reason="LOCAL_FILE_CHANGED")
            left_bytes -= len(piece)
            yield piece
    yield bytes(-size_bytes % tarfile.BLOCKSIZE)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
