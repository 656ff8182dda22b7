from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess
from collections.abc import Callable

import pytest

from vmherd.image.builtin.compression import decompress, lz4_legacy
from vmherd.image.errors import BuildFailed

CONTENT = b"\x7fELF" + bytes(range(256)) * 40

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
}

LZ4_MAGIC = b"\x02\x21\x4c\x18"


def lz4(*blocks: bytes) -> bytes:
    return LZ4_MAGIC + b"".join(len(block).to_bytes(4, "little") + block for block in blocks)


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_it_knows_a_format_by_its_first_bytes(compress: Callable[[bytes], bytes]) -> None:
    assert decompress(compress(CONTENT), "it") == CONTENT


def test_what_is_not_compressed_stays_as_it_is() -> None:
    assert decompress(CONTENT, "it") == CONTENT
    assert decompress(b"", "it") == b""


@pytest.mark.parametrize(
    ("data", "content"),
    [
        (lz4(), b""),
        (lz4(b"\x50hello"), b"hello"),
        (lz4(b"\x50hello", b"\x60 world"), b"hello world"),
        # 15 literals and more: 15 + 255 + 3, and exactly 15.
        (lz4(b"\xf0\xff\x03" + b"x" * 273), b"x" * 273),
        (lz4(b"\xf0\x00" + b"x" * 15), b"x" * 15),
        # A match of 4 bytes, 6 back, and one literal at the end.
        (lz4(b"\x60abcdef\x06\x00\x10!"), b"abcdefabcd!"),
        # A match that reaches into itself, of 15 + 4 + 1 bytes.
        (lz4(b"\x2fab\x02\x00\x01\x10!"), b"ab" + b"ab" * 10 + b"!"),
        # A match of 255 + 15 + 4 bytes, one back.
        (lz4(b"\x1fa\x01\x00\xff\x00\x10!"), b"a" * 275 + b"!"),
    ],
)
def test_lz4_sequences(data: bytes, content: bytes) -> None:
    assert lz4_legacy(data) == content
    assert decompress(data, "it") == content


DAMAGED = {
    "a match from before the start": lz4(b"\x2fab\x03\x00\x01\x10!"),
    "a match from nowhere": lz4(b"\x2fab\x00\x00\x01\x10!"),
    "the end inside of a distance": lz4(b"\x60abcdef\x06"),
    "gzip": gzip.compress(CONTENT)[:10] + b"\xff" * 40,
    "bzip2": bz2.compress(CONTENT)[:40] + b"\xff" * 40,
    "xz": lzma.compress(CONTENT)[:40] + b"\xff" * 40,
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_data_are_refused(data: bytes) -> None:
    with pytest.raises(BuildFailed, match="cannot decompress the kernel: "):
        decompress(data, "the kernel")


def test_without_zstd_it_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildFailed, match="install the package zstd"):
        decompress(b"\x28\xb5\x2f\xfd", "the kernel")


def test_zstd() -> None:
    compressed = subprocess.run(["zstd", "-c"], input=CONTENT, capture_output=True, check=True, timeout=60).stdout
    assert decompress(compressed, "it") == CONTENT
    with pytest.raises(BuildFailed, match="cannot decompress it: "):
        decompress(compressed[:-9], "it")
