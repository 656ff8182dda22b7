"""Tasks that work beside another one, started and ended without losing what went wrong in them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

T = TypeVar("T")

_log = structlog.get_logger()


def spawn(work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
    """Starts a task; should it crash, the log says so, since nobody may ever ask for its result."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_log_crash)
    return task


async def cancelled(task: asyncio.Task[None] | None) -> None:
    """Cancels a task, where there is one, and waits for its end."""
    if task:
        task.cancel()
        await asyncio.wait([task])


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Does work to its end also when the caller is cancelled in the middle; the cancellation goes on after it."""
    doing = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(doing)
    finally:
        await asyncio.wait([doing])
        if not doing.cancelled():
            doing.exception()  # asyncio would complain that nobody had looked at it


def _log_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("a task crashed", task=task.get_name(), exc_info=error)
