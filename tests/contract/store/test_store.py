"""What every store keeps. A new implementation joins by adding itself to the `store` fixture."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmherd.controller.store import Change, Compacted, Compare, Conflict, Entry, Put, SqliteStore, Store, StoreError
from vmherd.controller.store.base import PUTS_MAX

pytestmark = pytest.mark.anyio

KINDS = {"sqlite": lambda directory: SqliteStore(directory / "store.sqlite")}


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    opened = KINDS[request.param](tmp_path)
    yield opened
    await opened.close()


async def changes(store: Store, prefix: str, after: int, count: int) -> list[Change]:
    seen: list[Change] = []
    async with asyncio.timeout(60):
        async for change in store.watch(prefix, after):
            seen.append(change)
            if len(seen) == count:
                break
    return seen


async def test_a_new_store_is_empty_at_revision_0(store: Store) -> None:
    assert await store.get("a") is None
    assert await store.list("") == ([], 0)


async def test_a_key_remembers_the_revisions_that_made_and_changed_it(store: Store) -> None:
    assert await store.transact([Put("a", b"1")]) == 1
    assert await store.transact([Put("b", b"2")]) == 2
    assert await store.transact([Put("a", b"3")]) == 3
    assert await store.get("a") == Entry("a", b"3", create_revision=1, mod_revision=3)


async def test_list_gives_the_keys_with_a_prefix_in_order(store: Store) -> None:
    await store.transact([Put(key, b"") for key in ("p/b", "p/a", "q/a", "p", "p/\U0001f600", "o")])
    entries, revision = await store.list("p/")
    assert [entry.key for entry in entries] == ["p/a", "p/b", "p/\U0001f600"]
    assert revision == 1


async def test_a_transaction_is_done_whole_at_one_revision(store: Store) -> None:
    await store.transact([Put("gone", b"x")])
    revision = await store.transact([Put("a", b"1"), Put("b", b"2"), Put("gone", None)])
    assert await changes(store, "", 1, 3) == [
        Change(revision, "a", b"1", None),
        Change(revision, "b", b"2", None),
        Change(revision, "gone", None, b"x"),
    ]


async def test_a_transaction_whose_comparison_fails_changes_nothing(store: Store) -> None:
    await store.transact([Put("a", b"1")])
    with pytest.raises(Conflict) as raised:
        await store.transact([Put("a", b"2"), Put("b", b"2")], [Compare("b", 0), Compare("a", 0)])
    assert raised.value.key == "a"
    assert await store.list("") == ([Entry("a", b"1", 1, 1)], 1)


async def test_compare_and_set_lets_one_of_two_win(store: Store) -> None:
    await store.transact([Put("a", b"0")])
    results = await asyncio.gather(
        *(store.transact([Put("a", value)], [Compare("a", 1)]) for value in (b"1", b"2")), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "int"]


async def test_removing_what_is_not_there_changes_nothing(store: Store) -> None:
    await store.transact([Put("a", b"1")])
    assert await store.transact([Put("b", None)]) == 1
    assert await changes(store, "", 0, 1) == [Change(1, "a", b"1", None)]


async def test_a_key_that_was_removed_begins_anew(store: Store) -> None:
    await store.transact([Put("a", b"1")])
    await store.transact([Put("a", None)])
    assert await store.get("a") is None
    await store.transact([Put("a", b"2")], [Compare("a", 0)])
    assert await store.get("a") == Entry("a", b"2", create_revision=3, mod_revision=3)


async def test_too_large_a_transaction_is_refused(store: Store) -> None:
    with pytest.raises(StoreError):
        await store.transact([Put(str(number), b"") for number in range(PUTS_MAX + 1)])
    assert await store.list("") == ([], 0)


async def test_a_watch_tells_what_was_and_what_comes(store: Store) -> None:
    await store.transact([Put("a/1", b"1")])
    await store.transact([Put("b/1", b"1")])
    watching = asyncio.create_task(changes(store, "a/", 0, 3))
    await store.transact([Put("a/2", b"2")])
    await store.transact([Put("b/2", b"2")])
    await store.transact([Put("a/1", None)])
    assert [(change.revision, change.key) for change in await watching] == [(1, "a/1"), (3, "a/2"), (5, "a/1")]


async def test_a_watch_from_a_revision_begins_right_after_it(store: Store) -> None:
    for number in range(5):
        await store.transact([Put("a", str(number).encode())])
    assert [change.revision for change in await changes(store, "a", 3, 2)] == [4, 5]


async def test_a_watch_falls_behind_without_losing_anything(store: Store) -> None:
    for number in range(20):
        await store.transact([Put(f"{number}/{key}", b"") for key in range(PUTS_MAX)])
    seen = await changes(store, "", 0, 20 * PUTS_MAX)
    assert len({(change.revision, change.key) for change in seen}) == 20 * PUTS_MAX
    assert [change.revision for change in seen] == sorted(change.revision for change in seen)


async def test_compaction_forgets_changes_and_keeps_keys(store: Store) -> None:
    for number in range(4):
        await store.transact([Put("a", str(number).encode())])
    await store.compact(2)
    with pytest.raises(Compacted) as raised:
        await changes(store, "", 1, 1)
    assert raised.value.revision == 2
    assert [change.revision for change in await changes(store, "", 2, 2)] == [3, 4]
    assert await store.get("a") == Entry("a", b"3", create_revision=1, mod_revision=4)


async def test_close_ends_every_watch(store: Store) -> None:
    watching = asyncio.create_task(changes(store, "", 0, 1))
    await asyncio.sleep(0)
    await store.close()
    async with asyncio.timeout(60):
        assert await watching == []
    with pytest.raises(StoreError, match="closed"):
        await store.get("a")


async def test_a_cancelled_caller_leaves_no_doubt(store: Store) -> None:
    watching = asyncio.create_task(changes(store, "", 0, 1))
    writing = asyncio.create_task(store.transact([Put("a", b"1")]))
    await asyncio.sleep(0)
    writing.cancel()
    assert [change.key for change in await watching] == ["a"]


KEYS = st.sampled_from(["a", "b", "c/1", "c/2"])
PUTS = st.lists(st.tuples(KEYS, st.none() | st.binary(max_size=4)), max_size=4, unique_by=lambda put: put[0])


@given(transactions=st.lists(PUTS, max_size=12))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
async def test_the_log_replayed_gives_the_keys(
    transactions: list[list[tuple[str, bytes | None]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    for make in KINDS.values():
        store: Store = make(tmp_path_factory.mktemp("store"))
        for puts in transactions:
            await store.transact([Put(key, value) for key, value in puts])
        entries, revision = await store.list("")
        await store.transact([Put("end", b"")])
        replayed: dict[str, bytes] = {}
        async for change in store.watch("", 0):
            if change.key == "end":
                break
            assert change.previous == replayed.get(change.key)
            assert 0 < change.revision <= revision
            if change.value is None:
                del replayed[change.key]
            else:
                replayed[change.key] = change.value
        assert replayed == {entry.key: entry.value for entry in entries}
        await store.close()


async def test_what_was_stored_survives(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path / "store.sqlite")
    await first.transact([Put("a", b"1")])
    await first.compact(1)
    await first.close()
    second = SqliteStore(tmp_path / "store.sqlite")
    assert await second.list("") == ([Entry("a", b"1", 1, 1)], 1)
    assert await second.transact([Put("b", b"2")]) == 2
    with pytest.raises(Compacted):
        await changes(second, "", 0, 1)
    await second.close()


@pytest.mark.parametrize("content", [b"this is no database, and long enough to be looked at" * 100])
async def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=str(path)):
        SqliteStore(path)
    assert path.read_bytes() == content


async def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="version 99"):
        SqliteStore(path)


async def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.sqlite")
    await store.transact([Put("a", b"1")])
    await store._run(lambda db: db.execute("PRAGMA max_page_count = 1"))
    with pytest.raises(StoreError, match="full"):
        await store.transact([Put("b", b"x" * 1_000_000)])
    assert await store.list("") == ([Entry("a", b"1", 1, 1)], 1)
    await store.close()
