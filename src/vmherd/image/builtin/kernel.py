"""Takes a distribution's kernel apart: the plain ELF kernel in a bzImage, and the modules that others need."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable

from vmherd.image.builtin.compression import decompress
from vmherd.image.errors import BuildFailed

_SETUP_SECTORS_AT = 0x1F1
_MAGIC_AT = 0x202
_PAYLOAD_AT = 0x248
_SECTOR_BYTES = 512


def vmlinux(bz_image: bytes) -> bytes:
    """The ELF kernel that a bzImage carries, compressed, behind its real-mode code.

    QEMU starts it through its PVH entry point, which saves the guest from decompressing it: a seventh of a boot under
    emulation. The header's fields: https://docs.kernel.org/arch/x86/boot.html

    Raises:
        BuildFailed: this is no bzImage, or its payload cannot be decompressed.
    """
    if bz_image[_MAGIC_AT : _MAGIC_AT + 4] != b"HdrS":
        raise BuildFailed("the kernel is not in the bzImage format")
    offset, length = struct.unpack_from("<II", bz_image, _PAYLOAD_AT)
    start = (bz_image[_SETUP_SECTORS_AT] + 1) * _SECTOR_BYTES + offset
    payload, size = bz_image[start : start + length - 4], bz_image[start + length - 4 : start + length]
    kernel = decompress(payload, "the kernel")
    if not kernel.startswith(b"\x7fELF") or len(kernel) != int.from_bytes(size, "little"):
        raise BuildFailed("what the bzImage carries is not a whole ELF kernel")
    return kernel


def needed_by(module: bytes) -> list[str]:
    """The modules that a module needs directly, from the note of them that it carries."""
    note = re.search(rb"\0depends=([-\w,]*)\0", module)
    return [normal(name) for name in note[1].decode().split(",") if name] if note else []


def load_order(wanted: Iterable[str], needs: Callable[[str], Iterable[str]]) -> list[str]:
    """The wanted modules and all that they need, each once and after what it needs.

    Raises:
        BuildFailed: modules need each other in a circle.
    """
    order: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise BuildFailed(f"the kernel modules need each other in a circle: {' → '.join((*path, name))}")
        if name not in order:
            for needed in needs(name):
                visit(needed, (*path, name))
            order[name] = None

    for name in wanted:
        visit(name, ())
    return list(order)


def normal(name: str) -> str:
    """A module's name with underscores: `virtio-rng` and `virtio_rng` are one module."""
    return name.replace("-", "_")
