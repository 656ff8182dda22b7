"""Requests that are carried out exactly once, as they are kept in the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmherd.controller import requests
from vmherd.controller.records import REQUESTS, Outcome, Request, encode_request, request_key
from vmherd.controller.store import Put, SqliteStore
from vmherd.controller.store.base import PUTS_MAX
from vmherd.model.errors import InvalidArgument
from vmherd.model.instance import Operation, Verb

pytestmark = pytest.mark.anyio

REQUEST = Request(Verb.STOP, "fingerprint", "web", "operation", accepted_at_s=1000.0)
OUTCOME = Outcome(error="{}")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "store.sqlite")
    yield opened
    await opened.close()


async def begin(store: SqliteStore, request_id: str, request: Request = REQUEST) -> int:
    put, compare = requests.beginning(request_id, request)
    return await store.transact([put], [compare])


async def ids(store: SqliteStore) -> set[str]:
    entries, _ = await store.list(REQUESTS)
    return {entry.key.removeprefix(REQUESTS) for entry in entries}


async def test_from_its_beginning_to_its_end(store: SqliteStore) -> None:
    assert await requests.find(store, "a", "fingerprint") is None
    await begin(store, "a")
    assert await requests.find(store, "a", "fingerprint") == REQUEST
    operation = Operation("operation", Verb.STOP, request_ids=("a", "unknown"))
    revision = await store.transact(await requests.ending(store, operation, OUTCOME))
    found = await requests.find(store, "a", "fingerprint")
    assert found == replace(REQUEST, outcome=replace(OUTCOME, revision=revision))


async def test_no_id_is_no_request(store: SqliteStore) -> None:
    await begin(store, "")
    assert await requests.find(store, "", "fingerprint") is None


async def test_another_request_with_the_same_id(store: SqliteStore) -> None:
    await begin(store, "a")
    with pytest.raises(InvalidArgument, match="'a' was used for another request") as caught:
        await requests.find(store, "a", "another fingerprint")
    assert caught.value.reason == "REQUEST_ID_REUSED"


async def test_an_id_is_forgotten_a_while_after_its_request_came_to_an_end(store: SqliteStore) -> None:
    ended = replace(REQUEST, outcome=OUTCOME)
    await begin(store, "old", ended)
    await begin(store, "old and under way")
    await begin(store, "new", replace(ended, accepted_at_s=2000.0))
    await requests.forget_old(store, before_s=1000.0)
    assert await ids(store) == {"old", "old and under way", "new"}
    await requests.forget_old(store, before_s=1000.1)
    assert await ids(store) == {"old and under way", "new"}
    assert await requests.find(store, "old", "another fingerprint") is None


async def test_more_are_forgotten_than_one_transaction_holds(store: SqliteStore) -> None:
    value = encode_request(replace(REQUEST, outcome=OUTCOME))
    for start in range(0, 3 * PUTS_MAX, PUTS_MAX):
        await store.transact([Put(request_key(f"{start + number}"), value) for number in range(PUTS_MAX)])
    await requests.forget_old(store, before_s=2000.0)
    assert await ids(store) == set()
