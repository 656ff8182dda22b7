"""The store: a key/value log with revisions. `base` is the contract, `sqlite` keeps it in one file."""

from vmherd.controller.store.base import Change, Compacted, Compare, Conflict, Entry, Put, Store, StoreError
from vmherd.controller.store.sqlite import SqliteStore

__all__ = ["Change", "Compacted", "Compare", "Conflict", "Entry", "Put", "SqliteStore", "Store", "StoreError"]
