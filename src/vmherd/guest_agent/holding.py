"""Holding things of the guest's, such as open files and running programs, so that none is left when a caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Do work to its end also when the caller is cancelled in the middle; the cancellation goes on after it."""
    doing = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(doing)
    finally:
        await asyncio.wait([doing])
        if not doing.cancelled():
            doing.exception()  # asyncio would complain that nobody had looked at it


@asynccontextmanager
async def held(acquire: Coroutine[Any, Any, T], release: Callable[[T], Coroutine[Any, Any, None]]) -> AsyncIterator[T]:
    """Acquire something and release it at the end, also for a caller that is cancelled while it is acquired.

    The agent would carry a cancelled request out all the same, and nobody would learn the handle or pid.
    """
    acquiring = asyncio.ensure_future(acquire)
    try:
        yield await asyncio.shield(acquiring)
    finally:
        await uninterrupted(_released(acquiring, release))


async def _released(acquiring: asyncio.Future[T], release: Callable[[T], Coroutine[Any, Any, None]]) -> None:
    await asyncio.wait([acquiring])
    if not acquiring.cancelled() and acquiring.exception() is None:
        await release(acquiring.result())
