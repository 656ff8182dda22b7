"""One instance's QMP connection, against a control socket that says what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.framework.fake_qmp import FakeQmp, event
from vmherd.controller.monitor import Monitor
from vmherd.controller.tasks import cancelled
from vmherd.model.errors import Aborted, Unavailable
from vmherd.model.lifecycle import Event

pytestmark = pytest.mark.anyio
DEADLINE_S = 30.0
PANIC = event("SHUTDOWN", guest=True, reason="guest-panic")


class Heard:
    """What a monitor told, in order."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[object] = asyncio.Queue()
        self.asks_usernet = False

    def qmp_up(self, *, found: Event, agent_open: bool, usernet: str) -> None:
        self.news.put_nowait(("up", found, agent_open, *([usernet] if usernet else [])))

    def qmp_down(self) -> None:
        self.news.put_nowait("down")

    def qmp_event(self, name: str, data: Mapping[str, object]) -> None:
        self.news.put_nowait((name, data.get("reason")))

    async def next(self) -> object:
        async with asyncio.timeout(DEADLINE_S):
            return await self.news.get()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def socket() -> Iterator[Path]:
    with TemporaryDirectory(prefix="m-") as directory:
        yield Path(directory) / "qmp.sock"


@pytest.fixture
async def monitor(socket: Path, heard: Heard) -> AsyncIterator[Monitor]:
    it = Monitor(socket, "web", heard)
    running = asyncio.create_task(it.run())
    yield it
    await cancelled(running)
    assert running.cancelled()


async def test_it_comes_up_as_soon_as_there_is_a_socket_and_again_after_a_loss(
    monitor: Monitor, socket: Path, heard: Heard
) -> None:
    assert not monitor.up
    async with FakeQmp(socket, {"query-chardev": [{"label": "qga0", "frontend-open": True}]}) as qemu:
        for _ in range(2):
            assert await heard.next() == ("up", Event.UNDER_CONTROL, True)
            assert monitor.up
            qemu.hang_up()
            assert await heard.next() == "down"


@pytest.mark.usefixtures("monitor")
async def test_an_event_does_not_overtake_the_state_that_was_asked_for(socket: Path, heard: Heard) -> None:
    class Hasty(FakeQmp):
        def say(self, message: Mapping[str, object]) -> None:
            if message.get("return") == []:
                super().say(PANIC)
            super().say(message)

    async with Hasty(socket, {"query-status": {"running": False}}):
        assert await heard.next() == ("up", Event.UNDER_CONTROL_PAUSED, False)
        assert await heard.next() == ("SHUTDOWN", "guest-panic")


async def test_once_qemu_hung_up_its_last_words_were_told(monitor: Monitor, socket: Path, heard: Heard) -> None:
    async with FakeQmp(socket) as qemu:
        assert await heard.next() == ("up", Event.UNDER_CONTROL, False)
        qemu.say(PANIC)
        qemu.hang_up()
        await monitor.hung_up()
        assert heard.news.get_nowait() == ("SHUTDOWN", "guest-panic")
        assert heard.news.get_nowait() == "down"


async def test_a_guest_that_sleeps_is_told_from_one_that_is_paused(
    monitor: Monitor, socket: Path, heard: Heard
) -> None:
    status = {"running": False, "status": "suspended"}
    async with FakeQmp(socket, {"query-status": status}):
        assert await heard.next() == ("up", Event.UNDER_CONTROL_SUSPENDED, False)
        assert await monitor.suspended()
        status["status"] = "paused"
        assert not await monitor.suspended()


@pytest.mark.usefixtures("monitor")
async def test_a_machine_with_forwards_is_asked_for_its_ports_before_it_counts_as_up(
    socket: Path, heard: Heard
) -> None:
    heard.asks_usernet = True
    async with FakeQmp(socket, {"human-monitor-command": "Hub -1 (net0):\r\n"}) as qemu:
        assert await heard.next() == ("up", Event.UNDER_CONTROL, False, "Hub -1 (net0):\r\n")
        assert qemu.asked[-1] == "human-monitor-command"


async def test_what_a_command_can_come_to(monitor: Monitor, socket: Path, heard: Heard) -> None:
    with pytest.raises(Unavailable) as early:
        await monitor.execute("cont")
    assert early.value.reason == "QMP_NOT_CONNECTED"
    async with FakeQmp(socket, {"cont": {"a": 1}, "stop": ValueError("not now"), "quit": EOFError()}):
        await heard.next()
        assert await monitor.execute("cont") == {"a": 1}
        with pytest.raises(Aborted, match="QEMU refused stop: not now"):
            await monitor.execute("stop")
        with pytest.raises(Unavailable, match="QEMU hung up during quit"):
            await monitor.execute("quit")


async def test_a_cancellation_counts_also_when_the_answer_comes_at_the_same_moment(
    monitor: Monitor, socket: Path, heard: Heard
) -> None:
    async def call_and_wait() -> None:
        await monitor.execute("system_powerdown")
        await asyncio.Event().wait()

    async with FakeQmp(socket):
        await heard.next()
        for steps in range(40):  # among them is the moment
            calling = asyncio.create_task(call_and_wait())
            for _ in range(steps):
                await asyncio.sleep(0)
            calling.cancel()
            await asyncio.wait([calling], timeout=DEADLINE_S)
            assert calling.cancelled()
