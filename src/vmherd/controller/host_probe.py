"""Asks the helper which addresses an instance has on the host's networks, while its machine runs.

So a guest without an agent shows its address too. Nobody waits for an answer: it is a question now and then.
"""

from __future__ import annotations

import asyncio
from functools import partial

import structlog

from vmherd.controller.address_book import AddressBook
from vmherd.controller.helper import Helper
from vmherd.controller.inbox import Inbox
from vmherd.controller.instance_record import InstanceRecord
from vmherd.controller.tasks import cancelled, spawn
from vmherd.model.errors import VmherdError
from vmherd.model.instance import Address

_log = structlog.get_logger()

DELAYS_S = (0.2, 0.4, 0.4, *[1.0] * 3, *[2.0] * 30, 10.0)
"""Between looks while there is no address; the last one again and again, for who has none by now may never have one."""

REFRESH_S = 30.0
"""Between looks once there is one."""


class HostProbe:
    """Keeps what the helper tells of a machine's addresses in the instance's address book."""

    def __init__(self, helper: Helper, record: InstanceRecord, book: AddressBook, inbox: Inbox) -> None:
        self._helper = helper
        self._record = record
        self._book = book
        self._inbox = inbox
        self._asking: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """The machine runs; one that is on none of the host's networks has nothing to ask for."""
        if self._record.instance.on_bridge and not self._asking:
            name, generation = self._record.instance.name, self._record.instance.generation
            self._asking = spawn(self._ask(generation), f"host probe of {name}")

    async def end(self) -> None:
        """The machine has ended, or nobody is interested any more."""
        await cancelled(self._asking)
        self._asking = None
        self._book.by_host = ()

    async def _ask(self, generation: int) -> None:
        looks = 0
        while True:
            await self._helper.wait_connected()
            try:
                addresses = await self._helper.addresses(self._record.instance.uid)
            except VmherdError as error:
                name = self._record.instance.name
                _log.debug("asking the helper for addresses failed", name=name, error=error.message)
            else:
                await self._inbox.ask(partial(self._on_addresses, generation, addresses))
            await asyncio.sleep(REFRESH_S if self._book.by_host else DELAYS_S[min(looks, len(DELAYS_S) - 1)])
            looks += 1

    async def _on_addresses(self, generation: int, addresses: tuple[Address, ...]) -> None:
        # Since this was put in, the machine may have ended, and another one been started.
        if self._asking and self._record.instance.generation == generation:
            await self._book.host_told(addresses)
