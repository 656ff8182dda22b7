"""The readiness ladder: how far a start has come."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Rung(IntEnum):
    """The steps of a start, in their order."""

    PROCESS = 1
    QMP = 2
    AGENT = 3
    ADDRESS = 4


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
    """The rungs that a start has reached, in their order and without a gap."""

    steps: tuple[Step, ...] = ()

    @property
    def reached(self) -> Rung | None:
        """The last rung, None before the first."""
        return self.steps[-1].rung if self.steps else None

    def climb(self, rung: Rung, *, now_s: float, accepted_at_s: float) -> Readiness:
        """This readiness with a rung more; no change when it was reached already or one before it is missing."""
        if rung != (self.reached or 0) + 1:
            return self
        return Readiness((*self.steps, Step(rung, now_s, max(0.0, now_s - accepted_at_s))))

    def fall(self, rung: Rung) -> Readiness:
        """This readiness without the rungs above `rung`, after the guest rebooted or its agent went away."""
        return Readiness(tuple(step for step in self.steps if step.rung <= rung))
