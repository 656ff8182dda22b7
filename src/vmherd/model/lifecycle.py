"""The life of an instance as one table: `(state, event) → state`."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """Where an instance is in its life."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUSPENDED = "SUSPENDED"
    STOPPING = "STOPPING"
    FAILED = "FAILED"
    UNKNOWN = "UNKNOWN"


class Event(StrEnum):
    """What can happen to an instance: commands, what QEMU tells, what the helper tells."""

    START = "a start was accepted"
    STOP = "a stop was accepted"
    UNDER_CONTROL = "QEMU answers on its control socket and executes the guest"
    UNDER_CONTROL_PAUSED = "QEMU answers on its control socket and holds the guest"
    UNDER_CONTROL_SUSPENDED = "QEMU answers on its control socket and the guest sleeps"
    PAUSE = "QEMU has halted the virtual CPUs"
    SUSPEND = "the guest has suspended itself to memory"
    RESUME = "QEMU lets the virtual CPUs run again, or has woken the guest"
    GUEST_SHUTDOWN = "QEMU says that it is going down"
    START_FAILED = "the start did not succeed"
    ENDED = "the process ended because it was asked to, or the guest shut down"
    DIED = "the process ended by itself, or is gone"
    LOST = "neither QEMU nor the helper can be asked"


TRANSITIONS = MappingProxyType(
    {
        (State.STOPPED, Event.START): State.STARTING,
        (State.FAILED, Event.START): State.STARTING,
        (State.STARTING, Event.UNDER_CONTROL): State.RUNNING,
        (State.STARTING, Event.UNDER_CONTROL_PAUSED): State.PAUSED,
        (State.STARTING, Event.UNDER_CONTROL_SUSPENDED): State.SUSPENDED,
        (State.STARTING, Event.START_FAILED): State.FAILED,
        (State.STARTING, Event.STOP): State.STOPPING,
        (State.STARTING, Event.ENDED): State.STOPPED,
        (State.STARTING, Event.DIED): State.FAILED,
        (State.STARTING, Event.LOST): State.UNKNOWN,
        (State.RUNNING, Event.PAUSE): State.PAUSED,
        (State.RUNNING, Event.SUSPEND): State.SUSPENDED,
        (State.RUNNING, Event.UNDER_CONTROL_PAUSED): State.PAUSED,
        (State.RUNNING, Event.UNDER_CONTROL_SUSPENDED): State.SUSPENDED,
        (State.RUNNING, Event.STOP): State.STOPPING,
        (State.RUNNING, Event.GUEST_SHUTDOWN): State.STOPPING,
        (State.RUNNING, Event.ENDED): State.STOPPED,
        (State.RUNNING, Event.DIED): State.FAILED,
        (State.RUNNING, Event.LOST): State.UNKNOWN,
        (State.PAUSED, Event.RESUME): State.RUNNING,
        (State.PAUSED, Event.UNDER_CONTROL): State.RUNNING,
        (State.PAUSED, Event.UNDER_CONTROL_SUSPENDED): State.SUSPENDED,
        (State.PAUSED, Event.STOP): State.STOPPING,
        (State.PAUSED, Event.GUEST_SHUTDOWN): State.STOPPING,
        (State.PAUSED, Event.ENDED): State.STOPPED,
        (State.PAUSED, Event.DIED): State.FAILED,
        (State.PAUSED, Event.LOST): State.UNKNOWN,
        (State.SUSPENDED, Event.RESUME): State.RUNNING,
        (State.SUSPENDED, Event.UNDER_CONTROL): State.RUNNING,
        (State.SUSPENDED, Event.UNDER_CONTROL_PAUSED): State.PAUSED,
        (State.SUSPENDED, Event.STOP): State.STOPPING,
        (State.SUSPENDED, Event.GUEST_SHUTDOWN): State.STOPPING,
        (State.SUSPENDED, Event.ENDED): State.STOPPED,
        (State.SUSPENDED, Event.DIED): State.FAILED,
        (State.SUSPENDED, Event.LOST): State.UNKNOWN,
        (State.STOPPING, Event.STOP): State.STOPPING,
        (State.STOPPING, Event.START_FAILED): State.FAILED,
        (State.STOPPING, Event.ENDED): State.STOPPED,
        (State.STOPPING, Event.DIED): State.FAILED,
        (State.STOPPING, Event.LOST): State.UNKNOWN,
        (State.UNKNOWN, Event.UNDER_CONTROL): State.RUNNING,
        (State.UNKNOWN, Event.UNDER_CONTROL_PAUSED): State.PAUSED,
        (State.UNKNOWN, Event.UNDER_CONTROL_SUSPENDED): State.SUSPENDED,
        (State.UNKNOWN, Event.START_FAILED): State.FAILED,
        (State.UNKNOWN, Event.ENDED): State.STOPPED,
        (State.UNKNOWN, Event.DIED): State.FAILED,
    }
)
"""Every change of state there is. An event that has no entry for a state leaves it as it is."""

ACTIVE = frozenset(State) - {State.STOPPED, State.FAILED}
"""States in which a QEMU process runs or may run: nothing of the instance may be removed."""

AGENT_STATES = frozenset({State.RUNNING, State.STOPPING})
"""States in which a guest agent can answer."""


def after(state: State, event: Event) -> State:
    """The state after an event."""
    return TRANSITIONS.get((state, event), state)


def legal_states(event: Event) -> frozenset[State]:
    """The states in which a command's event is possible."""
    return frozenset(state for state, legal in TRANSITIONS if legal == event)
