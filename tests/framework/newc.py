"""Reads what `vmherd.image.builtin.cpio` writes, by the format's description and with nothing of that module."""

from __future__ import annotations

from dataclasses import dataclass

HEADER_BYTES = 110


@dataclass(frozen=True)
class Record:
    """One file of an archive: its header's fields, and its content."""

    inode: int
    mode: int
    uid: int
    gid: int
    links: int
    modified: int
    device: tuple[int, int]
    content: bytes


def read(archive: bytes) -> dict[str, Record]:
    """The records by name, in the archive's order, without the trailer."""
    records: dict[str, Record] = {}
    at = 0
    while True:
        header = archive[at : at + HEADER_BYTES]
        assert header[:6] == b"070701"
        inode, mode, uid, gid, links, modified, size, _, _, *device, name_size, checksum = (
            int(header[place : place + 8], 16) for place in range(6, HEADER_BYTES, 8)
        )
        assert checksum == 0
        name_at = at + HEADER_BYTES
        name = archive[name_at : name_at + name_size]
        assert name.endswith(b"\0")
        content_at = _aligned(name_at + name_size)
        at = _aligned(content_at + size)
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return records
        content = archive[content_at : content_at + size]
        assert len(content) == size
        records[name[:-1].decode()] = Record(inode, mode, uid, gid, links, modified, (device[0], device[1]), content)


def _aligned(position: int) -> int:
    return (position + 3) // 4 * 4
