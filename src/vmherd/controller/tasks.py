"""Tasks that work beside another one, started and ended without losing what went wrong in them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

_log = structlog.get_logger()


def spawn(work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
    """Starts a task; should it crash, the log says so, since nobody may ever ask for its result."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_log_crash)
    return task


async def cancelled(task: asyncio.Future[Any] | None) -> None:
    """Cancels a task, where there is one, and waits for its end."""
    if task:
        task.cancel()
        await asyncio.wait([task])


def _log_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("a task crashed", task=task.get_name(), exc_info=error)
