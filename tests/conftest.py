"""What all tests share."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# Each run tries the same examples, however slow the machine is. Others: pytest --hypothesis-profile=others
settings.register_profile("others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("others"), derandomize=True)
settings.load_profile("same")

# gRPC's C++ part writes past every log, now and then, into what a test compares.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

pytest_plugins = ["tests.framework.images"]


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_works() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and every child would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, which is what vmherd is written for."""
    return "asyncio"
