"""A record tells what is true at once, and stores it as soon as the store can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from vmherd.controller import instance_record
from vmherd.controller.instance_record import InstanceRecord
from vmherd.controller.records import decode_instance, instance_key
from vmherd.controller.store import Compare, Put, SqliteStore, StoreError
from vmherd.model.instance import Hardware, Instance
from vmherd.model.lifecycle import State

pytestmark = pytest.mark.anyio
DEADLINE_S = 30.0
WEB = Instance("web", "uid", "builtin", Hardware(1, 128), {}, 0.0)


class FullDisk(SqliteStore):
    """A store whose disk is full for some transactions."""

    failures = 0

    async def transact(self, puts: Sequence[Put], compares: Sequence[Compare] = ()) -> int:
        if self.failures:
            self.failures -= 1
            raise StoreError("database or disk is full")
        return await super().transact(puts, compares)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FullDisk]:
    opened = FullDisk(tmp_path / "store.sqlite")
    yield opened
    await opened.close()


async def test_a_change_is_stored_and_told(store: FullDisk) -> None:
    record = InstanceRecord(store, WEB, 0)
    waiting = asyncio.create_task(record.until(lambda: record.instance.state is State.RUNNING))
    await record.save(replace(WEB, state=State.RUNNING))
    async with asyncio.timeout(DEADLINE_S):
        await waiting
    entry = await store.get(instance_key("web"))
    assert entry is not None
    assert decode_instance(entry.value) == record.instance
    assert entry.mod_revision == record.revision == 1


async def test_no_change_is_no_revision(store: FullDisk) -> None:
    record = InstanceRecord(store, WEB, 7)
    changed = record.changed
    await record.save(replace(WEB))
    assert (record.revision, changed.is_set()) == (7, False)


async def test_what_cannot_be_stored_is_kept_and_stored_later(store: FullDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_record, "STORE_RETRY_S", 0.001)
    store.failures = 3
    record = InstanceRecord(store, WEB, 0)
    async with asyncio.timeout(DEADLINE_S):
        await record.save(replace(WEB, state=State.FAILED))
    assert store.failures == 0
    entry = await store.get(instance_key("web"))
    assert entry is not None
    assert decode_instance(entry.value).state is State.FAILED
