from __future__ import annotations

import gzip
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.image.builtin.kernel import load_order, needed_by, normal, vmlinux
from vmherd.image.errors import BuildFailed

ELF = b"\x7fELF" + b"code" * 100


def bz_image(payload: bytes, *, setup_sectors: int = 3, payload_offset: int = 700) -> bytes:
    """https://docs.kernel.org/arch/x86/boot.html"""
    setup = bytearray(512 * (setup_sectors + 1))
    setup[0x1F1] = setup_sectors
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, payload_offset, len(payload))
    return bytes(setup) + b"\xcc" * payload_offset + payload + b"\xcc" * 99


def with_size(compressed: bytes, size: int = len(ELF)) -> bytes:
    return compressed + size.to_bytes(4, "little")


@pytest.mark.parametrize("setup_sectors", [3, 39])
@pytest.mark.parametrize("payload_offset", [0, 700])
def test_the_kernel_is_found_where_the_header_says(setup_sectors: int, payload_offset: int) -> None:
    payload = with_size(gzip.compress(ELF))
    assert vmlinux(bz_image(payload, setup_sectors=setup_sectors, payload_offset=payload_offset)) == ELF


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"", "not in the bzImage format"),
        (ELF, "not in the bzImage format"),
        (bz_image(with_size(gzip.compress(b"MZ"), 2)), "not a whole ELF kernel"),
        (bz_image(with_size(gzip.compress(ELF), len(ELF) + 1)), "not a whole ELF kernel"),
        (bz_image(with_size(gzip.compress(ELF)))[:-200], "not a whole ELF kernel"),
    ],
)
def test_anything_else_is_refused(image: bytes, complaint: str) -> None:
    with pytest.raises(BuildFailed, match=complaint):
        vmlinux(image)


@pytest.mark.parametrize(
    ("note", "needed"),
    [
        (b"license=GPL\0depends=\0name=evdev\0", []),
        (b"license=GPL\0depends=virtio,virtio-ring\0name=virtio_net\0", ["virtio", "virtio_ring"]),
        (b"license=GPL\0softdepends=a\0", []),
    ],
)
def test_a_module_says_what_it_needs(note: bytes, needed: list[str]) -> None:
    assert needed_by(ELF + note + ELF) == needed


def test_hyphens_and_underscores_are_the_same() -> None:
    assert normal("virtio-rng") == "virtio_rng"


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    """Modules that need only modules with smaller numbers."""
    size = draw(st.integers(1, 9))
    return {
        str(number): [str(each) for each in draw(st.sets(st.integers(0, number - 1)))] if number else []
        for number in range(size)
    }


@given(graphs(), st.data())
def test_each_module_comes_once_and_after_what_it_needs(graph: dict[str, list[str]], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(sorted(graph)), max_size=4))
    order = load_order(wanted, graph.__getitem__)
    assert len(order) == len(set(order))
    assert set(wanted) <= set(order)
    for place, name in enumerate(order):
        assert set(graph[name]) <= set(order[:place])


def test_nothing_is_loaded_that_nobody_needs() -> None:
    assert load_order(["b"], {"a": [], "b": ["a"], "c": ["a"]}.__getitem__) == ["a", "b"]


def test_a_circle_is_named() -> None:
    with pytest.raises(BuildFailed, match="a → b → c → b"):
        load_order(["a"], {"a": ["b"], "b": ["c"], "c": ["b"]}.__getitem__)
