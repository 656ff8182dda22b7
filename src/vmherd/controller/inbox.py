"""Messages for one task, which takes them in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

T = TypeVar("T")
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

    async def ask(self, message: Callable[[], Awaitable[T]]) -> T:
        """Puts a message in and waits for what it gives or raises. A message whose sender is gone is handled too."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def handle() -> None:
            try:
                given = await message()
            except Exception as error:
                if answer.cancelled():
                    raise
                answer.set_exception(error)
            else:
                if not answer.cancelled():
                    answer.set_result(given)

        self.put(handle)
        return await answer

    async def serve(self, done: Callable[[], bool]) -> None:
        """Handles messages until one of them makes `done` true, and then those that came in before."""
        while not done() or not self._messages.empty():
            message = await self._messages.get()
            try:
                await message()
            except Exception:
                # A defect in one message must not leave the others without anybody who listens.
                _log.exception("a message was not handled", name=self._name)
