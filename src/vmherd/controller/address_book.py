"""The guest's addresses: who told which, and what of it is shown."""

from __future__ import annotations

import time
from dataclasses import replace

from vmherd.controller.addresses import merged
from vmherd.controller.instance_record import InstanceRecord
from vmherd.model.instance import Address, Source
from vmherd.model.readiness import Readiness, Rung


class AddressBook:
    """Shows addresses in an instance's record, and that the guest has one.

    Its callers are messages of the instance's inbox, for the record has one writer.
    """

    def __init__(self, record: InstanceRecord) -> None:
        shown = record.instance.addresses
        self._record = record
        self.by_agent = tuple(address for address in shown if address.source is Source.AGENT)
        self.by_host = tuple(address for address in shown if address.source is not Source.AGENT)

    async def agent_told(self, addresses: tuple[Address, ...]) -> None:
        """The guest agent tells these."""
        self.by_agent = addresses
        await self._show(self._record.instance.readiness)

    async def agent_left(self) -> None:
        """There is no agent any more to tell any."""
        self.by_agent = ()
        await self._show(self._record.instance.readiness.without(Rung.AGENT))

    async def host_told(self, addresses: tuple[Address, ...]) -> None:
        """The helper tells these, from leases and the neighbour table."""
        self.by_host = addresses
        await self._show(self._record.instance.readiness)

    async def _show(self, readiness: Readiness) -> None:
        instance = self._record.instance
        addresses = merged(self.by_agent, self.by_host)
        if addresses:
            readiness = readiness.climb(Rung.ADDRESS, now_s=time.time(), accepted_at_s=instance.accepted_at_s)
        else:
            readiness = readiness.without(Rung.ADDRESS)
        await self._record.save(replace(instance, addresses=addresses, readiness=readiness))
