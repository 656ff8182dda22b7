"""Holding things of the guest's, such as open files and running programs, so that none is left when a caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.channel import is_urgent
from vmherd.guest_agent.errors import AgentError, AgentFrozen

T = TypeVar("T")

THAW_TIMEOUT_S = 3600.0
_FIRST_PAUSE_S = 0.1
_LAST_PAUSE_S = 5.0
_PAUSE_GROWTH = 1.5


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

    The agent would carry a cancelled request out all the same, and nobody would learn the handle or pid. What `release`
    asks of the agent is urgent.
    """
    acquiring = asyncio.ensure_future(acquire)
    try:
        yield await asyncio.shield(acquiring)
    finally:
        await uninterrupted(_released(acquiring, release))


async def _released(acquiring: asyncio.Future[T], release: Callable[[T], Coroutine[Any, Any, None]]) -> None:
    await asyncio.wait([acquiring])
    if not acquiring.cancelled() and acquiring.exception() is None:
        await urgently(release(acquiring.result()))


async def urgently(work: Coroutine[Any, Any, T]) -> T:
    """Do work whose calls go before those of others."""
    before = is_urgent.set(True)
    try:
        return await work
    finally:
        is_urgent.reset(before)


async def eventually(agent: GuestAgent, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Do what tidies up; where file systems are frozen it goes on in the background, and is done after the thaw.

    `work` is called again after AgentFrozen. Other errors of the agent's are for nobody: who leaves has one that says
    more.
    """
    try:
        await work()
    except AgentFrozen:
        agent.in_background(_after_thaw(work))
    except AgentError:
        return


async def _after_thaw(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    pause_s = _FIRST_PAUSE_S
    with suppress(TimeoutError, AgentError):
        async with asyncio.timeout(THAW_TIMEOUT_S):
            while True:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * _PAUSE_GROWTH, _LAST_PAUSE_S)
                with suppress(AgentFrozen):
                    await work()
                    return
