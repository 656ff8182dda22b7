"""The input of a program that runs, on its way from a caller to the guest."""

from __future__ import annotations

import asyncio

from vmherd.model.errors import FieldViolation, InvalidArgument

AHEAD_MAX_BYTES = 4 << 20
PIECE_MAX_BYTES = 1 << 20


class Input:
    """Input that has come and was not taken yet."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ended = False
        self._changed = asyncio.Condition()

    async def put(self, data: bytes) -> None:
        """Adds to it, once less than `AHEAD_MAX_BYTES` are there. Raises `InvalidArgument` after its end."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._data) < AHEAD_MAX_BYTES)
            if self._ended:
                raise InvalidArgument.of([FieldViolation("input", "has ended before")])
            self._data += data
            self._changed.notify_all()

    async def end(self) -> None:
        """Says that no more comes."""
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def take(self) -> bytes:
        """Takes the next piece out, once there is one; b"" at the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._data or self._ended)
            piece = bytes(self._data[:PIECE_MAX_BYTES])
            del self._data[: len(piece)]
            self._changed.notify_all()
            return piece
