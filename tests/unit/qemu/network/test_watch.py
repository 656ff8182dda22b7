"""What the kernel tells, taken apart, whatever it is."""

from __future__ import annotations

import socket

from hypothesis import given
from hypothesis import strategies as st

from vmherd.qemu.network import watch


@given(data=st.binary(max_size=200))
def test_any_bytes_are_taken_apart(data: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        theirs.send(data or b"\0")
        for _, body in watch._messages(ours):
            assert isinstance(watch._table(body), str)
