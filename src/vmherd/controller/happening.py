"""What a guest does that completes a command of its agent, as QEMU tells it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from vmherd.model.machine import AGENT_PORT_ID


class Happening(StrEnum):
    """What a guest can do, in the words for somebody who waited for it in vain."""

    SHUTDOWN = "the guest did not turn itself off"
    RESET = "the guest did not reset itself"
    SUSPEND = "the guest did not suspend itself"
    SUSPEND_DISK = "the guest did not suspend itself to disk"
    AGENT_LEFT = "the guest's agent did not end"


def happening_of(event: str, data: Mapping[str, object]) -> Happening | None:
    """What an event of QEMU means, if it is one of these.

    https://qemu-project.gitlab.io/qemu/interop/qemu-qmp-ref.html
    """
    match event, data:
        case "SHUTDOWN", {"reason": "guest-shutdown"}:
            return Happening.SHUTDOWN
        case "RESET", _:
            return Happening.RESET
        case "SUSPEND", _:
            return Happening.SUSPEND
        case "SUSPEND_DISK", _:
            return Happening.SUSPEND_DISK
        case "VSERPORT_CHANGE", {"id": str(port), "open": False} if port == AGENT_PORT_ID:
            return Happening.AGENT_LEFT
        case _:
            return None
