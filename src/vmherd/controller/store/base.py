"""The contract of a store: the operations that etcd also has, and no more.

Every transaction that changes something has a revision of its own, one more than the last. A key remembers the
revision that made it and the one that changed it last; the log remembers every change until it is compacted.

The conformance suite in `tests/contract/store` holds for every implementation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

PUTS_MAX = 128
"""How many keys one transaction changes at most; etcd's own default."""


class StoreError(Exception):
    """The store could not do it; nothing was changed."""


class Conflict(StoreError):
    """A comparison of a transaction did not hold; `key` is the first that failed."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is not at the expected revision")
        self.key = key


class Compacted(StoreError):
    """The changes asked for are no longer in the log, which begins after `revision`."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"changes up to revision {revision} were compacted")
        self.revision = revision


@dataclass(frozen=True)
class Entry:
    """A key as it stands."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int


@dataclass(frozen=True)
class Change:
    """A key that was written, or removed where `value` is None."""

    revision: int
    key: str
    value: bytes | None
    previous: bytes | None
    """The value before; None where there was none."""


@dataclass(frozen=True)
class Compare:
    """Holds when the key was changed last at `mod_revision`; 0 means that there is no such key."""

    key: str
    mod_revision: int


@dataclass(frozen=True)
class Put:
    """Writes a key, or removes it where `value` is None. Removing what is not there changes nothing."""

    key: str
    value: bytes | None


class Store(Protocol):
    """A key/value log with revisions."""

    async def get(self, key: str) -> Entry | None:
        """The key as it stands, None where there is none."""

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        """All keys with this prefix, in order, and the revision at which they stood so."""

    async def transact(self, puts: Sequence[Put], compares: Sequence[Compare] = ()) -> int:
        """Does all of it or nothing, and gives the revision; that of the last change where nothing changed.

        Raises:
            Conflict: a comparison did not hold.
            StoreError: more than `PUTS_MAX` puts, or the store failed, for instance because the disk is full.
        """

    def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        """Every change of keys with this prefix after a revision, in order, without an end.

        Raises:
            Compacted: when iterated, if changes after this revision are gone.
        """

    async def compact(self, revision: int) -> None:
        """Forgets the changes up to a revision. The keys stay."""

    async def close(self) -> None:
        """Ends every watch and lets go of the file."""
