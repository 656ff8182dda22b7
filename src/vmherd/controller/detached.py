"""Programs that outlive those who started them, of all instances."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from vmherd.controller.process_records import PROCESSES, ProcessRecord, decode_process
from vmherd.controller.process_tracker import ProcessTracker
from vmherd.controller.store import Put, Store
from vmherd.controller.store.base import PUTS_MAX
from vmherd.controller.supervisor import Supervisor
from vmherd.model.errors import FieldViolation, InvalidArgument

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000

_log = structlog.get_logger()


class Detached:
    """The trackers of all instances whose programs anybody has asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._trackers: dict[str, ProcessTracker] = {}

    async def open(self, supervisors: Iterable[Supervisor]) -> None:
        """Takes up what an earlier controller has left for these instances, which are all there are."""
        entries, _ = await self._store.list(PROCESSES)
        known = {supervisor.instance.uid: supervisor for supervisor in supervisors}
        orphans = []
        for entry in entries:
            try:
                record = decode_process(entry.value)
            except ValueError as error:
                _log.error("a process's record cannot be read; was it written by a newer vmherd?", error=str(error))
                continue
            if supervisor := known.get(record.uid):
                self.of(supervisor).take_up(record)
            else:
                orphans.append(Put(entry.key, None))
        for start in range(0, len(orphans), PUTS_MAX):
            await self._store.transact(orphans[start : start + PUTS_MAX])

    async def close(self) -> None:
        """Tracks no more. The programs run on."""
        for tracker in list(self._trackers.values()):
            await tracker.close()

    def of(self, supervisor: Supervisor) -> ProcessTracker:
        """The tracker of an instance."""
        uid = supervisor.instance.uid
        if uid not in self._trackers:
            self._trackers[uid] = ProcessTracker(supervisor, self._store, lambda: self._trackers.pop(uid))
        return self._trackers[uid]


def page_of(records: Iterable[ProcessRecord], *, size: int, token: str) -> tuple[list[ProcessRecord], str]:
    """Some of the records, the oldest first, and the token for those after them.

    Raises:
        InvalidArgument: the size is negative.
    """
    if size < 0:
        raise InvalidArgument.of([FieldViolation("page_size", "must not be negative")])
    size = min(size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
    after = [record for record in sorted(records, key=_page_token) if _page_token(record) > token]
    return after[:size], _page_token(after[size - 1]) if len(after) > size else ""


def _page_token(record: ProcessRecord) -> str:
    return f"{record.started_at_s:.6f}-{record.id}"  # of one length for the next 250 years
