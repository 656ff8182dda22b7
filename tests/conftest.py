"""What all tests share."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.framework.images"]


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, which is what vmherd is written for."""
    return "asyncio"
