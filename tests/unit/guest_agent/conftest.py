from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.framework.fake_agent import FakeAgent
from vmherd.guest_agent import GuestAgent


@pytest.fixture
def path() -> Iterator[Path]:
    # Socket paths hold 107 bytes, so this is not pytest's own directory.
    with tempfile.TemporaryDirectory(prefix="vmherd-") as folder:
        yield Path(folder) / "agent.sock"


@pytest.fixture
async def fake(path: Path) -> AsyncIterator[FakeAgent]:
    async with FakeAgent(path) as fake:
        yield fake


@pytest.fixture
async def agent(fake: FakeAgent) -> AsyncIterator[GuestAgent]:
    async with GuestAgent(fake.path) as agent:
        yield agent
