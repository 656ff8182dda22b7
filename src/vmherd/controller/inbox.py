"""Messages for one task, which takes them in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

Message = Callable[[], Awaitable[None]]

_log = structlog.get_logger()


class Inbox:
    """What happens to one thing, as a queue of messages: each is handled before the next one begins."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._messages: asyncio.Queue[Message] = asyncio.Queue()

    def put(self, message: Message) -> None:
        """Puts a message in."""
        self._messages.put_nowait(message)

    async def tell(self, message: Message) -> None:
        """Puts a message in and waits until it was handled."""
        handled = asyncio.Event()

        async def handle() -> None:
            try:
                await message()
            finally:
                handled.set()

        self.put(handle)
        await handled.wait()

    async def serve(self, done: Callable[[], bool]) -> None:
        """Handles messages until one of them makes `done` true, and then what came before it was known."""
        while not done() or not self._messages.empty():
            message = await self._messages.get()
            try:
                await message()
            except Exception:
                # A defect in one message must not leave the others without anybody who listens.
                _log.exception("a message was not handled", name=self._name)
