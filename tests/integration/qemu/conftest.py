from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.qemu import house as houses


@pytest.fixture
async def house() -> AsyncIterator[houses.House]:
    async with houses.house() as it:
        yield it
