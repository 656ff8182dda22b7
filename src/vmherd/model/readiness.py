"""The readiness ladder: how far a start has come.

Each rung stands on the one before it, but for the last: an address is told by the agent, or by the host's side of a
network. There a guest whose agent is slow, or that has none, has its address without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Rung(IntEnum):
    """The steps of a start, in their order."""

    PROCESS = 1
    QMP = 2
    AGENT = 3
    ADDRESS = 4


STANDS_ON = {Rung.QMP: Rung.PROCESS, Rung.AGENT: Rung.QMP, Rung.ADDRESS: Rung.QMP}
"""The rung without which another one cannot be reached."""

WAITING_FOR = {
    Rung.PROCESS: "the QEMU process",
    Rung.QMP: "QEMU's control socket",
    Rung.AGENT: "the guest agent; does the image start qemu-guest-agent? its serial console's log tells",
    Rung.ADDRESS: "an address on the guest's network interface; is there a DHCP client in the guest?",
}
"""What somebody who waits for a rung is told."""


@dataclass(frozen=True)
class Step:
    """A rung that was reached."""

    rung: Rung
    reached_at_s: float
    """Seconds since the epoch."""
    elapsed_s: float
    """Seconds since the start was accepted."""


@dataclass(frozen=True)
class Readiness:
    """The rungs that a start has reached, in the ladder's order."""

    steps: tuple[Step, ...] = ()

    @property
    def reached(self) -> Rung | None:
        """The last rung that all those before it lead up to, None before the first."""
        return next((rung for rung in reversed(Rung) if all(map(self.has, range(1, rung + 1)))), None)

    def has(self, rung: int) -> bool:
        """Whether a rung was reached, also where one before it was not."""
        return any(step.rung == rung for step in self.steps)

    def climb(self, rung: Rung, *, now_s: float, accepted_at_s: float) -> Readiness:
        """This readiness with a rung more; no change when it was reached already or the one it stands on is missing."""
        if self.has(rung) or (rung in STANDS_ON and not self.has(STANDS_ON[rung])):
            return self
        step = Step(rung, now_s, max(0.0, now_s - accepted_at_s))
        return Readiness(tuple(sorted((*self.steps, step), key=lambda step: step.rung)))

    def without(self, rung: Rung) -> Readiness:
        """This readiness without a rung, after the agent went away or the last address did."""
        return Readiness(tuple(step for step in self.steps if step.rung != rung))
