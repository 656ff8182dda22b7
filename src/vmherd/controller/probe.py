"""Looks for the guest agent from the moment somebody opens its port, and asks it for the guest's addresses."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import structlog

from vmherd.controller.address_book import AddressBook
from vmherd.controller.addresses import addresses_of
from vmherd.controller.inbox import Inbox
from vmherd.controller.instance_record import InstanceRecord
from vmherd.controller.tasks import cancelled, spawn
from vmherd.guest_agent import AgentError, AgentFrozen, CommandUnavailable, GuestAgent
from vmherd.model.instance import Address
from vmherd.model.readiness import Rung

_log = structlog.get_logger()

COMMAND_TIMEOUT_S = 3.0
PING_DELAY_S = 0.5
"""Between attempts to get an answer; the first one nearly always does."""

ADDRESS_DELAYS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Between looks while the guest has no address; the last one again and again."""

ADDRESS_REFRESH_S = 30.0
"""Between looks once it has one."""


class Probe:
    """Keeps what the agent tells in an instance's record: its own rungs and the guest's addresses.

    The agent has no events, so its answers have to be asked for. A task asks, and the supervisor's task, which calls
    the public methods, writes.
    """

    def __init__(self, agent: GuestAgent, record: InstanceRecord, book: AddressBook, inbox: Inbox) -> None:
        self._agent = agent
        self._record = record
        self._book = book
        self._inbox = inbox
        self._port_open = False
        self._asking: asyncio.Task[None] | None = None

    async def set_port_open(self, port_open: bool, why: str = "") -> None:
        """Takes note of whether somebody in the guest holds the agent's port open, and if not, of why that is."""
        if port_open and not self._port_open:
            self._asking = spawn(self._ask(), f"probe of {self._record.instance.name}")  # begins after this
        if not port_open:
            await cancelled(self._asking)
            self._asking = None
            await self._book.agent_left()
        self._port_open = port_open
        self._agent.set_port_open(port_open, why)

    async def close(self) -> None:
        """Asks no more."""
        await cancelled(self._asking)

    async def _ask(self) -> None:
        name = self._record.instance.name
        while not await self._answers():  # noqa: ASYNC110  nothing in the guest tells us
            await asyncio.sleep(PING_DELAY_S)
        await self._inbox.ask(self._on_answer)
        macs = frozenset(nic.mac for nic in self._record.instance.nics)
        looks = 0
        while macs:
            try:
                interfaces = await self._agent.execute("guest-network-get-interfaces", timeout_s=COMMAND_TIMEOUT_S)
            except AgentFrozen as error:  # it will tell again
                _log.debug("the agent is frozen", name=name, error=str(error))
            except CommandUnavailable as error:
                _log.info("the agent does not tell addresses", name=name, error=str(error))
                return
            except AgentError as error:
                _log.debug("asking for addresses failed", name=name, error=str(error))
            else:
                await self._inbox.ask(partial(self._on_addresses, addresses_of(interfaces, macs)))
            delay_s = ADDRESS_DELAYS_S[min(looks, len(ADDRESS_DELAYS_S) - 1)]
            await asyncio.sleep(ADDRESS_REFRESH_S if self._book.by_agent else delay_s)
            looks += 1

    async def _answers(self) -> bool:
        try:
            await self._agent.ping(timeout_s=COMMAND_TIMEOUT_S)
        except AgentError as error:
            _log.debug("the agent does not answer yet", name=self._record.instance.name, error=str(error))
            return False
        return True

    # Messages. Since they were put in, the port may have been closed.

    async def _on_answer(self) -> None:
        if self._port_open:
            await self._record.save(replace(self._record.instance, readiness=self._record.climbed(Rung.AGENT)))

    async def _on_addresses(self, addresses: tuple[Address, ...]) -> None:
        if self._port_open:
            await self._book.agent_told(addresses)
