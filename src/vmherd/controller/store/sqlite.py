"""A store in one SQLite file. https://www.sqlite.org/wal.html"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from vmherd.controller.store.base import PUTS_MAX, Change, Compacted, Compare, Conflict, Entry, Put, StoreError

SCHEMA_VERSION = 1
WATCH_BATCH = 500

_SCHEMA = """
CREATE TABLE entry (
    key TEXT PRIMARY KEY,
    value BLOB NOT NULL,
    create_revision INTEGER NOT NULL,
    mod_revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE change (
    revision INTEGER NOT NULL,
    key TEXT NOT NULL,
    value BLOB,
    previous BLOB,
    PRIMARY KEY (revision, key)
) WITHOUT ROWID;
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counter VALUES ('revision', 0), ('compacted', 0);
"""

_LAST = "\U0010ffff"
"""Sorts behind every other character, so a prefix and this character bound the keys that have the prefix."""

T = TypeVar("T")


class SqliteStore:
    """A store in one SQLite file, with all access in one thread of its own."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it.

        Raises:
            StoreError: it cannot be opened, is no store, or was written by a newer version.
        """
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._changed = asyncio.Event()
        self._closed = False
        try:
            self._db = self._thread.submit(_open, path).result()
        except (sqlite3.Error, StoreError) as error:
            self._thread.shutdown()
            raise StoreError(f"cannot open the store {path}: {error}") from error

    async def get(self, key: str) -> Entry | None:
        """See `Store.get`."""
        return await self._run(lambda db: _get(db, key))

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        """See `Store.list`."""

        def read(db: sqlite3.Connection) -> tuple[list[Entry], int]:
            rows = db.execute(
                "SELECT key, value, create_revision, mod_revision FROM entry WHERE key >= ? AND key < ? ORDER BY key",
                (prefix, prefix + _LAST),
            )
            return [Entry(*row) for row in rows], _counter(db, "revision")

        return await self._run(read)

    async def transact(self, puts: Sequence[Put], compares: Sequence[Compare] = ()) -> int:
        """See `Store.transact`."""
        if len(puts) > PUTS_MAX:
            raise StoreError(f"a transaction changes at most {PUTS_MAX} keys")
        # The thread carries it out even when the caller is cancelled, and those who watch must hear of it then too.
        return await asyncio.shield(asyncio.ensure_future(self._commit(puts, compares)))

    async def _commit(self, puts: Sequence[Put], compares: Sequence[Compare]) -> int:
        revision = await self._run(lambda db: _transact(db, puts, compares))
        self._changed.set()
        self._changed = asyncio.Event()
        return revision

    async def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        """See `Store.watch`."""
        seen = after_revision
        while not self._closed:
            changed = self._changed
            batch, upto = await self._run(partial(_changes, prefix=prefix, after=seen))
            for change in batch:
                yield change
            seen = upto
            if not batch:
                await changed.wait()

    async def compact(self, revision: int) -> None:
        """See `Store.compact`."""

        def forget(db: sqlite3.Connection) -> None:
            with db:
                upto = min(revision, _counter(db, "revision"))
                db.execute("DELETE FROM change WHERE revision <= ?", (upto,))
                db.execute("UPDATE counter SET value = max(value, ?) WHERE name = 'compacted'", (upto,))

        await self._run(forget)

    async def close(self) -> None:
        """See `Store.close`."""
        if not self._closed:
            self._closed = True
            self._changed.set()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
            self._thread.shutdown()

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise StoreError("the store is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._db)
        except sqlite3.Error as error:
            raise StoreError(f"the store failed: {error}") from error


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        # NORMAL may lose the last transactions when the host loses power; an accepted launch must not be among them.
        db.execute("PRAGMA synchronous = FULL")
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(f"its schema is version {version} and this vmherd knows {SCHEMA_VERSION}; use a newer one")
        if version == 0:
            db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def _counter(db: sqlite3.Connection, name: str) -> int:
    value: int = db.execute("SELECT value FROM counter WHERE name = ?", (name,)).fetchone()[0]
    return value


def _get(db: sqlite3.Connection, key: str) -> Entry | None:
    row = db.execute("SELECT key, value, create_revision, mod_revision FROM entry WHERE key = ?", (key,)).fetchone()
    return Entry(*row) if row else None


def _transact(db: sqlite3.Connection, puts: Sequence[Put], compares: Sequence[Compare]) -> int:
    with db:
        db.execute("BEGIN IMMEDIATE")
        for compare in compares:
            entry = _get(db, compare.key)
            if (entry.mod_revision if entry else 0) != compare.mod_revision:
                raise Conflict(compare.key)
        last = _counter(db, "revision")
        revision = last + 1
        for put in puts:
            before = _get(db, put.key)
            if put.value is not None:
                created = before.create_revision if before else revision
                db.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)", (put.key, put.value, created, revision))
            elif before:
                db.execute("DELETE FROM entry WHERE key = ?", (put.key,))
            else:
                continue
            db.execute(
                "INSERT INTO change VALUES (?, ?, ?, ?)",
                (revision, put.key, put.value, before.value if before else None),
            )
            last = revision
        db.execute("UPDATE counter SET value = ? WHERE name = 'revision'", (last,))
        return last


def _changes(db: sqlite3.Connection, *, prefix: str, after: int) -> tuple[list[Change], int]:
    """The next changes after a revision, and the revision up to which there is nothing more to read."""
    compacted = _counter(db, "compacted")
    if after < compacted:
        raise Compacted(compacted)
    rows = db.execute(
        "SELECT revision, key, value, previous FROM change"
        " WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision, key LIMIT ?",
        (after, prefix, prefix + _LAST, WATCH_BATCH),
    ).fetchall()
    if len(rows) < WATCH_BATCH:
        return [Change(*row) for row in rows], max(after, _counter(db, "revision"))
    # The rest of the last revision may lie behind the limit: leave that revision for the next round.
    whole = [row for row in rows if row[0] < rows[-1][0]] or rows
    return [Change(*row) for row in whole], whole[-1][0]
