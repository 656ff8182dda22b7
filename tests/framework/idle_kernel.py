"""A kernel that boots in no time and does nothing."""

from __future__ import annotations

import struct


def idle_kernel() -> bytes:
    """A multiboot kernel that halts for good.

    https://www.gnu.org/software/grub/manual/multiboot/multiboot.html
    """
    magic, addresses_given, load_address, header_bytes = 0x1BADB002, 1 << 16, 0x100000, 32
    code = b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp to the hlt
    end = load_address + header_bytes + len(code)
    checksum = -(magic + addresses_given) & 0xFFFFFFFF
    entry = load_address + header_bytes
    header = (magic, addresses_given, checksum, load_address, load_address, end, end, entry)
    return struct.pack("<8I", *header) + code
