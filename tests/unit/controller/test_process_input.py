"""The input of programs: what waits, what does not, and what the caller is told of it."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.controller.conftest import DEADLINE_S
from vmherd.controller.process_input import AHEAD_MAX_BYTES, PIECE_MAX_BYTES, Input
from vmherd.model.errors import InvalidArgument

pytestmark = pytest.mark.anyio


async def test_input_comes_out_as_it_came_in_pieces_of_a_bounded_size() -> None:
    data = Input()
    for piece in (b"a", b"b", bytes(PIECE_MAX_BYTES)):
        await data.put(piece)
    await data.end()
    pieces = [await data.take(), await data.take(), await data.take()]
    assert list(map(len, pieces)) == [PIECE_MAX_BYTES, 2, 0]
    assert b"".join(pieces) == b"ab" + bytes(PIECE_MAX_BYTES)


async def test_only_what_is_ahead_of_the_program_by_much_waits() -> None:
    data = Input()
    async with asyncio.timeout(DEADLINE_S):
        await data.put(bytes(AHEAD_MAX_BYTES - 1))
        await data.put(bytes(PIECE_MAX_BYTES))
        waiting = asyncio.ensure_future(data.put(b"x"))
        await asyncio.wait([waiting], timeout=0.01)
        assert not waiting.done()
        await data.take()
        await waiting


async def test_nothing_comes_after_the_end() -> None:
    data = Input()
    await data.end()
    with pytest.raises(InvalidArgument, match="input"):
        await data.put(b"x")
