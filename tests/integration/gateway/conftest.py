"""A gateway on a loopback port, and a scripted controller behind it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.gateway.peer import Peer
from vmherd.api.settings.v1.settings_pb2 import GatewaySettings
from vmherd.gateway.app import serving as gateway_serving
from vmherd.rpc.serving import serving as rpc_serving

DEADLINE_S = 60.0
"""For what takes milliseconds where nothing else runs."""


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One event loop for all tests here, so that they share one gateway."""
    return "asyncio"


@pytest.fixture(scope="session")
def shared_dir() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vmherd-") as path:
        yield Path(path)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """The same for one test."""
    with tempfile.TemporaryDirectory(prefix="vmherd-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
async def running_peer(shared_dir: Path) -> AsyncIterator[Peer]:
    """The controller that all tests share."""
    peer = Peer()
    async with rpc_serving(peer.services, shared_dir / "c.sock"):
        yield peer


@pytest.fixture
async def peer(running_peer: Peer) -> AsyncIterator[Peer]:
    """The controller, with no answer yet."""
    running_peer.reset()
    yield running_peer
    running_peer.reset()


@pytest.fixture(scope="session")
async def gateway(running_peer: Peer, shared_dir: Path) -> AsyncIterator[str]:
    """The address of a gateway that asks for no token."""
    settings = GatewaySettings(listen="127.0.0.1:0", controller=str(shared_dir / "c.sock"), no_token=True)
    async with gateway_serving(settings) as address:
        yield address


@pytest.fixture(scope="session")
async def http(gateway: str) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of that gateway; making one takes longer than most tests here."""
    async with httpx.AsyncClient(base_url=f"http://{gateway}", timeout=DEADLINE_S, trust_env=False) as client:
        yield client
