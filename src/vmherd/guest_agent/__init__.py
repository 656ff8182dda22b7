"""An asyncio client for the QEMU guest agent: give it the address of its socket.

::

    async with GuestAgent("/run/vm/agent.sock") as agent:
        print(await agent.execute("guest-get-osinfo", timeout_s=5))
        print((await run(agent, ["uname", "-a"], timeout_s=5)).stdout)

The agent has to give back the `id` of a request, which only very old ones do not. `vmherd.guest_agent.errors` explains
what can go wrong.
"""

from __future__ import annotations

from vmherd.guest_agent.address import Address, TcpAddress, UnixAddress, parse_address
from vmherd.guest_agent.agent import AgentInfo, CommandInfo, GuestAgent
from vmherd.guest_agent.errors import (
    AgentError,
    AgentFrozen,
    AgentNotConfigured,
    AgentNotConnected,
    AgentNotRunning,
    AgentUnavailable,
    AgentUnresponsive,
    CommandDisabled,
    CommandFailed,
    CommandNotFound,
    CommandTimedOut,
    CommandUnavailable,
    CommandUnfinished,
    ProtocolError,
)
from vmherd.guest_agent.process import NoLiveOutput, Process, boot_id_of, open_process, run, start_process
from vmherd.guest_agent.programs import CommandResult
from vmherd.guest_agent.proxy import Proxy, listening
from vmherd.guest_agent.spool import Output, Stream, follow

# The names are in the order of their importance.
__all__ = [  # noqa: RUF022
    "GuestAgent",
    "run",
    "open_process",
    "start_process",
    "Process",
    "follow",
    "boot_id_of",
    "AgentError",
    "AgentUnavailable",
    "AgentNotConfigured",
    "AgentNotRunning",
    "AgentNotConnected",
    "AgentUnresponsive",
    "CommandUnavailable",
    "CommandNotFound",
    "CommandDisabled",
    "AgentFrozen",
    "CommandFailed",
    "CommandTimedOut",
    "CommandUnfinished",
    "ProtocolError",
    "NoLiveOutput",
    "CommandResult",
    "Output",
    "Stream",
    "AgentInfo",
    "CommandInfo",
    "Address",
    "UnixAddress",
    "TcpAddress",
    "parse_address",
    "Proxy",
    "listening",
]
