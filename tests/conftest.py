"""What all tests share."""

from __future__ import annotations

import signal

import pytest

pytest_plugins = ["tests.framework.images"]


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_works() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and every child would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, which is what vmherd is written for."""
    return "asyncio"
