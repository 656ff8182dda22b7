"""An asyncio client for the QEMU guest agent: give it a socket path.

::

    async with GuestAgent("/run/vm/agent.sock") as agent:
        print(await agent.execute("guest-get-osinfo", timeout_s=5))
        print((await run(agent, ["uname", "-a"], timeout_s=5)).stdout)

The agent has to give back the `id` of a request, which only very old ones do not. `vmherd.guest_agent.errors` explains
what can go wrong.
"""

from __future__ import annotations

from vmherd.guest_agent.agent import AgentInfo, CommandInfo, GuestAgent
from vmherd.guest_agent.command import CommandResult, run
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
    CommandUnavailable,
    CommandUnfinished,
    ProtocolError,
)

# The names are in the order of their importance.
__all__ = [  # noqa: RUF022
    "GuestAgent",
    "run",
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
    "CommandUnfinished",
    "ProtocolError",
    "CommandResult",
    "AgentInfo",
    "CommandInfo",
]
