"""What QEMU's events mean for an instance.

https://qemu-project.gitlab.io/qemu/interop/qemu-qmp-ref.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmherd.model.lifecycle import Event
from vmherd.model.machine import AGENT_PORT_ID


@dataclass(frozen=True)
class Meaning:
    """What follows from an event, in this order."""

    agent_left: str = ""
    """Why nobody in the guest holds the agent's port open any more; empty where that stays as it is."""
    agent_came: bool = False
    """Somebody has opened the agent's port."""
    was_reset: bool = False
    """The guest begins anew, without anything that it had in its memory."""
    shutdown_reason: str = ""
    """Why QEMU goes down, where it does."""
    event: Event | None = None
    """What happens to the instance's state."""


_MEANINGS = {
    "STOP": Meaning(event=Event.PAUSE),
    "RESUME": Meaning(event=Event.RESUME),
    "SUSPEND": Meaning(agent_left="the guest has suspended itself to memory", event=Event.SUSPEND),
    "WAKEUP": Meaning(event=Event.RESUME),
    "RESET": Meaning(agent_left="the guest was reset, and its agent is not back yet", was_reset=True),
}


def meaning_of(name: str, data: Mapping[str, object]) -> Meaning:
    """What an event of QEMU means; nothing for all those that do not matter."""
    match name, data:
        case "SHUTDOWN", _:
            return Meaning(shutdown_reason=str(data.get("reason", "unknown")), event=Event.GUEST_SHUTDOWN)
        case "VSERPORT_CHANGE", {"id": str(port)} if port == AGENT_PORT_ID:
            # Within a second QEMU tells only the last change: one that opens an open port hides that it was closed.
            left = "its agent has left: it was stopped, or the guest goes down"
            return Meaning(agent_left=left, agent_came=data.get("open") is True)
        case _:
            return _MEANINGS.get(name, Meaning())
