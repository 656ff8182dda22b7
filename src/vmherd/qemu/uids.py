"""The users that machines run as, one for each. Whose a uid is, is kept as the owner of the machine's state directory.

So the record cannot be lost without the machine, and a uid is free again once the machine's files are gone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmherd.model.errors import ResourceExhausted

FIRST_DEFAULT = 1_900_000_000
COUNT_DEFAULT = 65_536


@dataclass(frozen=True)
class Uids:
    """A range of uids that nobody else on the host has."""

    first: int = FIRST_DEFAULT
    count: int = COUNT_DEFAULT

    @property
    def probe(self) -> int:
        """For a QEMU that runs no machine: one that is asked for its version, or measured."""
        return self.first

    @property
    def dnsmasq(self) -> int:
        """For the networks' DHCP servers."""
        return self.first + 1

    @property
    def machines(self) -> range:
        """For machines."""
        return range(self.first + 2, self.first + self.count)


def lowest_free(machines: range, taken: Collection[int]) -> int:
    """The uid of a machine that has none yet.

    Raises:
        ResourceExhausted: all are taken.
    """
    uid = next((uid for uid in machines if uid not in taken), None)
    if uid is None:
        raise ResourceExhausted(
            f"all {len(machines)} users for machines are taken; delete instances, or set `uids` to a larger range",
            reason="UIDS_EXHAUSTED",
        )
    return uid


def owners(instances: int) -> Iterator[int]:
    """The owners of the machines' state directories: of all that is in the directory that this descriptor is of."""
    with os.scandir(instances) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                yield entry.stat(follow_symlinks=False).st_uid


def running(machines: range) -> Iterator[int]:
    """Those of these users who have processes."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            uid = os.stat(f"/proc/{pid}").st_uid
            # One that has ended and that nobody has waited for has no words left.
            if uid in machines and Path(f"/proc/{pid}/cmdline").read_bytes():
                yield uid
