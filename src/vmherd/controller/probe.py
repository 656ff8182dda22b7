"""Looks for the guest agent from the moment somebody opens its port, and asks it for the guest's addresses."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import structlog

from vmherd.controller.addresses import addresses_of
from vmherd.guest_agent import AgentError, CommandUnavailable
from vmherd.model.machine import mac_of

if TYPE_CHECKING:
    from vmherd.controller.supervisor import Supervisor

_log = structlog.get_logger()

COMMAND_TIMEOUT_S = 3.0
PING_DELAY_S = 0.5
"""Between attempts to get an answer; the first one nearly always does."""

ADDRESS_DELAYS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Between looks while the guest has no address; the last one again and again."""

ADDRESS_REFRESH_S = 30.0
"""Between looks once it has one."""


async def probe(supervisor: Supervisor) -> None:
    """Tells the supervisor when the agent answers and what addresses the guest has, until cancelled.

    The agent has no events, so its answers have to be asked for.
    """
    while not await _answers(supervisor):  # noqa: ASYNC110  nothing in the guest tells us
        await asyncio.sleep(PING_DELAY_S)
    await supervisor.tell(supervisor.agent_answered)
    macs = frozenset({mac_of(supervisor.instance.uid)})
    looks = 0
    while True:
        try:
            interfaces = await supervisor.agent.execute("guest-network-get-interfaces", timeout_s=COMMAND_TIMEOUT_S)
        except CommandUnavailable as error:
            _log.info("the agent does not tell addresses", name=supervisor.instance.name, error=str(error))
            return
        except AgentError as error:
            _log.debug("asking for addresses failed", name=supervisor.instance.name, error=str(error))
        else:
            addresses = addresses_of(interfaces, macs)
            await supervisor.tell(partial(supervisor.addresses_seen, addresses))
        delay_s = ADDRESS_DELAYS_S[min(looks, len(ADDRESS_DELAYS_S) - 1)]
        await asyncio.sleep(ADDRESS_REFRESH_S if supervisor.instance.addresses else delay_s)
        looks += 1


async def _answers(supervisor: Supervisor) -> bool:
    try:
        await supervisor.agent.ping(timeout_s=COMMAND_TIMEOUT_S)
    except AgentError as error:
        _log.debug("the agent does not answer yet", name=supervisor.instance.name, error=str(error))
        return False
    return True
