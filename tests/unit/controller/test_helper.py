"""The controller's ear at the helper: what it hears, in which order, over every loss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest

from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.controller import helper as helper_module
from vmherd.controller.helper import Helper, Process
from vmherd.controller.tasks import cancelled
from vmherd.model.errors import Unavailable
from vmherd.rpc.channel import open_channel

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("kept_loop")]
DEADLINE_S = 30.0


class Watched(qemu_pb2_grpc.QemuServiceServicer):
    """A helper that knows one process, and another one later."""

    async def Watch(  # noqa: N802  named by the proto
        self, request: qemu_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[qemu_pb2.WatchResponse]:
        yield qemu_pb2.WatchResponse(process=qemu_pb2.Process(uid="old", generation=1, pid=41))
        yield qemu_pb2.WatchResponse(synced=True)
        yield qemu_pb2.WatchResponse(process=qemu_pb2.Process(uid="new", generation=1, pid=42))
        await asyncio.Event().wait()


class Heard:
    """What the helper told, each with whether calls to it were possible at that moment."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        self.helper: Helper

    def _hear(self, what: str) -> None:
        self.news.put_nowait((what, self.helper.connected))

    def process_seen(self, process: Process) -> None:
        self._hear(process.uid)

    def all_seen(self, uids: frozenset[str]) -> None:
        self._hear("all: " + " ".join(uids))

    def helper_lost(self) -> None:
        self._hear("lost")

    async def next(self) -> tuple[str, bool]:
        async with asyncio.timeout(DEADLINE_S):
            return await self.news.get()


@pytest.fixture
def socket() -> Iterator[Path]:
    with TemporaryDirectory(prefix="h-") as directory:
        yield Path(directory) / "qemu.sock"


@pytest.fixture
async def heard(socket: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Heard]:
    monkeypatch.setattr(helper_module, "PATIENCE_S", 0.1)
    listener = Heard()
    async with open_channel(socket) as channel:
        listener.helper = Helper(channel, str(socket))
        following = asyncio.create_task(listener.helper.follow(listener))
        yield listener
        await cancelled(following)


@asynccontextmanager
async def serving(socket: Path) -> AsyncIterator[None]:
    server = grpc.aio.server()
    qemu_pb2_grpc.add_QemuServiceServicer_to_server(Watched(), server)  # type: ignore[abstract]
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    yield
    await server.stop(None)


async def test_a_helper_that_comes_and_goes(socket: Path, heard: Heard) -> None:
    assert not heard.helper.lost
    assert await heard.next() == ("lost", False)
    with pytest.raises(Unavailable, match=f"the helper cannot be reached at {socket}"):
        heard.helper.check_connected()
    for _ in range(2):
        async with serving(socket):
            # Who hears of a process can act on it: were it the other way round, nobody would tell when that began.
            while (news := await heard.next()) == ("lost", False):
                pass
            assert news == ("old", True)
            assert await heard.next() == ("all: old", True)
            assert await heard.next() == ("new", True)
            assert not heard.helper.lost
            heard.helper.check_connected()
        assert await heard.next() == ("lost", False)
        assert heard.helper.lost
