"""Keeps a freeze of a guest's file systems from lasting longer than was asked for, whatever becomes of the caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import structlog

from vmherd.controller.inbox import Inbox
from vmherd.controller.instance_record import InstanceRecord
from vmherd.controller.store import StoreError
from vmherd.controller.tasks import cancelled, spawn
from vmherd.guest_agent import AgentError, AgentUnresponsive, CommandFailed, CommandUnavailable, GuestAgent
from vmherd.model.errors import ResourceExhausted
from vmherd.model.lifecycle import AGENT_STATES

_log = structlog.get_logger()

THAW_AFTER_DEFAULT_S = 60.0
THAW_AFTER_MAX_S = 3600.0
THAW_TIMEOUT_S = 30.0
"""Long, for the guest's own scripts may run before the agent answers."""

RETRY_DELAYS_S = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Between attempts to thaw; the last one again and again."""


class Freezer:
    """Freezes and thaws one guest's file systems.

    The time at which vmherd thaws by itself is in the instance's record before the agent is asked to freeze, so that
    the next controller knows of it. Thawing what is not frozen does no harm, so whenever in doubt this thaws. A caller
    or a task asks the agent, and the supervisor's task, which handles the messages, writes.
    """

    def __init__(self, agent: GuestAgent, record: InstanceRecord, inbox: Inbox) -> None:
        self._agent = agent
        self._record = record
        self._inbox = inbox
        self._turn = asyncio.Lock()
        self._waiting: asyncio.Task[None] | None = None

    async def freeze(
        self, command: str, arguments: Mapping[str, object], *, timeout_s: float, thaw_after_s: float
    ) -> object:
        """Carries out one of the agent's two commands that freeze. The first of several freezes sets the deadline.

        Raises:
            ResourceExhausted: the deadline could not be stored; nothing was frozen.
            AgentError: it failed; what it may have frozen is thawed at once.
        """
        async with self._alone(command, timeout_s) as left_s:
            until_s = time.time() + min(thaw_after_s, THAW_AFTER_MAX_S)
            await self._inbox.ask(partial(self._on_intent, until_s))
            settle = self._on_doubt
            try:
                frozen = await self._agent.execute(command, arguments, timeout_s=left_s)
                settle = self._on_frozen if frozen else self._on_nothing_frozen
            except AgentError as error:
                if _froze_nothing(error):
                    settle = self._on_nothing_frozen
                raise
            finally:
                self._inbox.put(partial(settle, until_s))
            return frozen

    async def thaw(self, *, timeout_s: float) -> object:
        """Thaws, and says how many file systems that were."""
        async with self._alone("guest-fsfreeze-thaw", timeout_s) as left_s:
            thawed = await self._agent.execute("guest-fsfreeze-thaw", timeout_s=left_s)
            await self._inbox.ask(self.forget)
            return thawed

    async def close(self) -> None:
        """Leaves what is frozen to the next controller."""
        await cancelled(self._waiting)

    def take_up(self) -> None:
        """Takes up what an earlier controller left."""
        if self._record.instance.frozen_until_s is not None:
            self._waiting = spawn(self._thaw_in_time(), f"thaw of {self._record.instance.name}")

    async def forget(self) -> None:
        """Takes note that nothing is frozen: it was thawed, the guest was reset, or there is no guest any more."""
        await self._set_deadline(None)

    @asynccontextmanager
    async def _alone(self, command: str, timeout_s: float) -> AsyncIterator[float]:
        """Waits for earlier freezes and thaws to be over, and gives the time that is left."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._turn.acquire()
        except TimeoutError as error:
            raise AgentUnresponsive(
                f"{command}: an earlier freeze or thaw was not over within {timeout_s:.3g} s",
                command=command,
                elapsed_s=timeout_s,
            ) from error
        try:
            yield deadline_s - loop.time()
        finally:
            self._turn.release()

    async def _thaw_in_time(self) -> None:
        instance = self._record.instance
        await asyncio.sleep(left_s(instance.frozen_until_s or 0.0))
        _log.warning("a freeze has to end: thawing the guest's file systems", name=instance.name)
        attempts = 0
        while True:
            await self._record.until(lambda: self._record.instance.state in AGENT_STATES)
            try:
                await self.thaw(timeout_s=THAW_TIMEOUT_S)
            except AgentError as error:
                _log.error("cannot thaw the guest's file systems; trying again", name=instance.name, error=str(error))
            await asyncio.sleep(RETRY_DELAYS_S[min(attempts, len(RETRY_DELAYS_S) - 1)])
            attempts += 1

    # Messages.

    async def _on_intent(self, until_s: float) -> None:
        if self._record.instance.frozen_until_s is None:
            try:
                await self._record.intend(replace(self._record.instance, frozen_until_s=until_s))
            except StoreError as error:
                raise ResourceExhausted(
                    f"nothing was frozen: {error}; is the disk of the state directory full?", reason="STORE_FAILED"
                ) from error
            self.take_up()

    async def _on_frozen(self, until_s: float) -> None:
        # The agent freezes only what was thawed, so an earlier deadline was for a freeze that is over. One that is
        # gone was forgotten in the meantime, with the guest's reset or end.
        if self._record.instance.frozen_until_s not in (None, until_s):
            await self._set_deadline(until_s)

    async def _on_nothing_frozen(self, until_s: float) -> None:
        if self._record.instance.frozen_until_s == until_s:
            await self.forget()

    async def _on_doubt(self, until_s: float) -> None:
        if self._record.instance.frozen_until_s == until_s:
            await self._set_deadline(time.time())

    async def _set_deadline(self, until_s: float | None) -> None:
        await cancelled(self._waiting)
        self._waiting = None
        await self._record.save(replace(self._record.instance, frozen_until_s=until_s))
        self.take_up()


def left_s(until_s: float) -> float:
    """How long it is until then. It is never longer than a freeze may last, for the host's clock may be set back."""
    return min(max(0.0, until_s - time.time()), THAW_AFTER_MAX_S)


def _froze_nothing(error: AgentError) -> bool:
    """Whether it is certain that the agent did not even begin."""
    return isinstance(error, CommandUnavailable) or not (isinstance(error, CommandFailed) or error.outcome_unknown)
