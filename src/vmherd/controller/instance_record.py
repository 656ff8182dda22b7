"""One instance's record: the memory that answers questions, the store behind it, and those who wait for a change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from vmherd.controller.records import encode_instance, instance_key
from vmherd.controller.store import Put, Store, StoreError
from vmherd.model.instance import Instance
from vmherd.model.readiness import Readiness, Rung

STORE_RETRY_S = 1.0

_log = structlog.get_logger()


class InstanceRecord:
    """What is known of one instance. It has one writer."""

    def __init__(self, store: Store, instance: Instance, revision: int) -> None:
        self.instance = instance
        self.revision = revision
        self._store = store
        self._changed = asyncio.Event()

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change; another one stands here from then on."""
        return self._changed

    def climbed(self, *rungs: Rung) -> Readiness:
        """The instance's readiness with these rungs, reached now."""
        readiness = self.instance.readiness
        for rung in rungs:
            readiness = readiness.climb(rung, now_s=time.time(), accepted_at_s=self.instance.accepted_at_s)
        return readiness

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds that can only become true with a change."""
        while not condition():
            await self._changed.wait()

    async def intend(self, instance: Instance) -> None:
        """Stores what is about to be done.

        Raises:
            StoreError: it could not be stored, and nothing has changed.
        """
        self.revision = await self._store.transact([Put(instance_key(instance.name), encode_instance(instance))])
        self._set(instance)
        self.notify()

    async def save(self, instance: Instance) -> None:
        """Takes note of what is true already; tells those who wait if that is a change."""
        if instance == self.instance:
            return
        self._set(instance)
        put = Put(instance_key(instance.name), encode_instance(instance))

        async def puts() -> list[Put]:
            return [put]

        await self.commit(puts)
        self.notify()

    async def commit(self, puts: Callable[[], Awaitable[list[Put]]]) -> None:
        """Stores what is true already, however long it takes until the store can."""
        while True:
            try:
                self.revision = await self._store.transact(await puts())
                return
            except StoreError as error:
                _log.error("cannot store what happened; trying again", name=self.instance.name, error=str(error))
                await asyncio.sleep(STORE_RETRY_S)

    def _set(self, instance: Instance) -> None:
        before, self.instance = self.instance, instance
        if instance.state is not before.state:
            ended = instance.last_exit if instance.last_exit != before.last_exit else None
            told = {"uid": instance.uid, "name": instance.name, "generation": instance.generation}
            _log.info(str(instance.state), **told, **({"why": ended.detail} if ended else {}))

    def notify(self) -> None:
        """Wakes those who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
