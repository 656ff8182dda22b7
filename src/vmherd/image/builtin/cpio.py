"""Writes a cpio archive in the newc format, which is what the kernel unpacks as its first root file system.

The same tree always gives the same bytes: sorted, owned by root, dated 1970. No rights are needed, since nothing of
the tree has to exist as a file. The format: https://docs.kernel.org/driver-api/early-userspace/buffer-format.html
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class File:
    """A regular file."""

    data: bytes
    permissions: int = 0o644


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Directory:
    """A directory. Only one that is empty or has other permissions needs to be named."""

    permissions: int = 0o755


@dataclass(frozen=True)
class CharacterDevice:
    """A character device."""

    major: int
    minor: int
    permissions: int = 0o600


Entry = File | Link | Directory | CharacterDevice


def archive(tree: Mapping[str, Entry]) -> bytes:
    """The archive of a tree, which has an entry for each relative path. Missing parents are added.

    Raises:
        ValueError: a path is not plain and relative, or lies below something that is no directory.
    """
    complete: dict[str, Entry] = {}
    for path, entry in tree.items():
        complete[path] = entry
        for parent in _parents(path):
            if not isinstance(tree.get(parent, Directory()), Directory):
                raise ValueError(f"{path!r} lies below {parent!r}, which is no directory")
            complete.setdefault(parent, Directory())
    complete |= tree
    # A path sorts after its parents, which must be there before it is unpacked.
    records = [_record(number, path, complete[path]) for number, path in enumerate(sorted(complete), start=1)]
    return b"".join((*records, _header(name="TRAILER!!!", links=1)))


def _parents(path: str) -> list[str]:
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or str(pure) != path or "\0" in path:
        raise ValueError(f"not a plain relative path: {path!r}")
    return [str(parent) for parent in pure.parents][:-1]


def _record(number: int, path: str, entry: Entry) -> bytes:
    match entry:
        case File(data, permissions):
            return _header(path, number, stat.S_IFREG | permissions, size=len(data)) + _padded(data)
        case Link(target):
            data = os.fsencode(target)
            return _header(path, number, stat.S_IFLNK | 0o777, size=len(data)) + _padded(data)
        case Directory(permissions):
            return _header(path, number, stat.S_IFDIR | permissions, links=2)
        case CharacterDevice(major, minor, permissions):
            return _header(path, number, stat.S_IFCHR | permissions, device=(major, minor))


def _header(
    name: str, number: int = 0, mode: int = 0, *, size: int = 0, links: int = 1, device: tuple[int, int] = (0, 0)
) -> bytes:
    encoded = os.fsencode(name) + b"\0"
    owner, group, modified, host_device, checksum = 0, 0, 0, (0, 0), 0
    fields = (
        *(number, mode, owner, group, links, modified, size),
        *host_device,
        *device,
        *(len(encoded), checksum),
    )
    return _padded(b"070701" + b"".join(b"%08x" % field for field in fields) + encoded)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
