"""Undoes the compressions that kernels and kernel modules come in."""

from __future__ import annotations

import bz2
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping

from vmherd.image.errors import BuildFailed

ZSTD_TIMEOUT_S = 60.0

_LZ4_MAGIC = b"\x02\x21\x4c\x18"
_MORE = 15
"""A length that goes on in the bytes that follow."""


def decompress(data: bytes, what: str) -> bytes:
    """The content of `data`; data that are not compressed are given back as they are.

    Raises:
        BuildFailed: `what` is damaged, or needs a tool that the host does not have.
    """
    for magic, decompressor in _DECOMPRESSORS.items():
        if data.startswith(magic):
            try:
                return decompressor(data)
            except (OSError, EOFError, IndexError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise BuildFailed(f"cannot decompress {what}: {error}") from error
    return data


def lz4_legacy(data: bytes) -> bytes:
    """The content of an LZ4 file in the legacy format, which Debian's kernels use and Python does not know.

    https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md

    Raises:
        IndexError: the data end too early.
        ValueError: they refer to something before their start.
    """
    content = bytearray()
    position = len(_LZ4_MAGIC)
    while position < len(data):
        start = position + 4
        position = start + int.from_bytes(data[position:start], "little")
        _lz4_block(data, start, position, content)
    return bytes(content)


def _lz4_block(data: bytes, position: int, end: int, content: bytearray) -> None:
    while position < end:
        token = data[position]
        literals, position = token >> 4, position + 1
        if literals == _MORE:
            literals, position = _lz4_length(data, position)
        content += data[position : position + literals]
        position += literals
        if position >= end:  # a block's last sequence has no match
            return
        distance = data[position] | data[position + 1] << 8
        length, position = token & 15, position + 2
        if length == _MORE:
            length, position = _lz4_length(data, position)
        length += 4
        start = len(content) - distance
        if distance == 0 or start < 0:
            raise ValueError("a match lies outside of the data")
        if length <= distance:
            content += content[start : start + length]
        else:  # a match that reaches into what it writes repeats itself
            content += (content[start:] * (length // distance + 1))[:length]


def _lz4_length(data: bytes, position: int) -> tuple[int, int]:
    length = _MORE
    while data[position] == 255:
        length, position = length + 255, position + 1
    return length + data[position], position + 1


def _zstd(data: bytes) -> bytes:
    tool = shutil.which("zstd")
    if tool is None:
        raise BuildFailed("the kernel or its modules are compressed with zstd: install the package zstd")
    process = subprocess.run([tool, "-dcq"], input=data, capture_output=True, timeout=ZSTD_TIMEOUT_S, check=False)
    if process.returncode:
        raise OSError(process.stderr.decode(errors="replace").strip())
    return process.stdout


_DECOMPRESSORS: Mapping[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": lambda data: zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data),
    b"BZh": lambda data: bz2.BZ2Decompressor().decompress(data),
    b"\xfd7zXZ\x00": lambda data: lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data),
    b"\x5d\x00\x00": lambda data: lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data),
    b"\x28\xb5\x2f\xfd": _zstd,
    _LZ4_MAGIC: lz4_legacy,
}
