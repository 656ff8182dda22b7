"""What a herd finds when it opens."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from vmherd.controller.herd import Herd
from vmherd.controller.records import instance_key
from vmherd.controller.store import Put, SqliteStore
from vmherd.model.errors import FailedPrecondition

pytestmark = pytest.mark.anyio


async def test_a_record_that_is_none_is_named_and_left_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.sqlite")
    await store.transact([Put(instance_key("web"), b'{"name": 1}')])
    with pytest.raises(FailedPrecondition, match="instances/web cannot be read") as raised:
        await Herd(Mock(store=store)).open()
    assert raised.value.reason == "RECORD_NOT_READABLE"
    entry = await store.get(instance_key("web"))
    assert entry
    assert entry.value == b'{"name": 1}'
    await store.close()
