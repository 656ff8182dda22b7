"""Instances are started when the host has booted, and at no other time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import structlog

from tests.framework.fake_helper import FakeHelper, fake_helper
from tests.framework.fake_qmp import FakeQmp
from tests.unit.controller.conftest import RUNNING, STOPPED, UID, herd_in, world_in
from vmherd.api.qemu.v1 import qemu_pb2
from vmherd.controller import autostart
from vmherd.controller.autostart import BOOT_KEY
from vmherd.controller.herd import Herd
from vmherd.controller.records import encode_instance, instance_key
from vmherd.controller.store import Put, SqliteStore
from vmherd.model.errors import FailedPrecondition
from vmherd.model.instance import Cause, Instance
from vmherd.model.layout import InstanceRun, StateDirectory
from vmherd.model.lifecycle import State

pytestmark = pytest.mark.anyio
WANTED = replace(STOPPED, autostart=True)
REFUSAL = FailedPrecondition("not today")

Boot = Callable[[], None]
Open = Callable[[], AbstractAsyncContextManager[Herd]]


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Boot:
    """Boots the host."""
    boot_id = tmp_path / "boot_id"
    monkeypatch.setattr(autostart, "BOOT_ID", boot_id)

    def boot() -> None:
        boot_id.write_text(f"{uuid4()}\n")

    boot()
    return boot


@pytest.fixture
async def helper(directory: Path) -> AsyncIterator[FakeHelper]:
    """A helper that refuses every start, after it has taken note of it."""
    fake = FakeHelper()
    fake.refusal = REFUSAL
    async with fake_helper(directory / "qemu.sock", fake):
        yield fake


@pytest.fixture
def open_herd(directory: Path, kept_loop: None) -> Open:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Herd]:
        async with world_in(directory, directory / "qemu.sock") as world, herd_in(world) as herd:
            yield herd

    return opened


async def stored(directory: Path, *instances: Instance) -> None:
    state = StateDirectory(directory / "state")
    state.path.mkdir()
    store = SqliteStore(state.store)
    await store.transact([Put(instance_key(instance.name), encode_instance(instance)) for instance in instances])
    await store.close()


async def autostarted() -> None:
    """Waits until the herd that was opened last has done what it does about autostart."""
    [task] = [task for task in asyncio.all_tasks() if task.get_name() == "autostart"]
    await asyncio.wait([task])


async def test_once_for_each_boot_and_not_for_each_controller(
    boot: Boot, directory: Path, helper: FakeHelper, open_herd: Open
) -> None:
    await stored(directory, WANTED, replace(STOPPED, name="other", uid=str(uuid4())))
    for starts in (1, 2):
        for _ in range(3):
            async with open_herd() as herd:
                await autostarted()
                assert [machine.name for machine in helper.started] == ["web"] * starts
                web, other = herd.find("web").instance, herd.find("other").instance
                assert (web.state, web.generation, other.state) == (State.FAILED, starts, State.STOPPED)
        boot()


@pytest.mark.usefixtures("boot")
async def test_many_are_started_once_each(directory: Path, helper: FakeHelper, open_herd: Open) -> None:
    names = [f"vm{number}" for number in range(30)]
    await stored(directory, *(replace(WANTED, name=name, uid=str(uuid4())) for name in names))
    async with open_herd():
        await autostarted()
        assert sorted(machine.name for machine in helper.started) == sorted(names)


@pytest.mark.usefixtures("boot", "helper")
async def test_a_start_that_fails_is_logged_and_leaves_a_failed_instance(directory: Path, open_herd: Open) -> None:
    await stored(directory, WANTED)
    with structlog.testing.capture_logs() as logs:
        async with open_herd() as herd:
            await autostarted()
            exit_ = herd.find("web").instance.last_exit
    assert exit_ is not None
    assert (exit_.cause, exit_.detail) == (Cause.START_FAILED, "not today")
    [failure] = [log for log in logs if log["event"] == "autostart failed"]
    assert (failure["name"], failure["log_level"]) == ("web", "error")
    assert "not today" in failure["error"]


@pytest.mark.usefixtures("boot")
async def test_what_a_record_says_of_the_last_boot_is_not_taken_for_true(
    directory: Path, helper: FakeHelper, open_herd: Open
) -> None:
    await stored(directory, replace(RUNNING, autostart=True))
    async with open_herd():
        await autostarted()
        assert [(machine.name, machine.generation) for machine in helper.started] == [("web", 2)]


@pytest.mark.usefixtures("boot")
async def test_what_runs_is_left_alone(directory: Path, run: InstanceRun, helper: FakeHelper, open_herd: Open) -> None:
    helper.processes = [qemu_pb2.Process(uid=UID, generation=1, pid=42)]
    await stored(directory, replace(RUNNING, autostart=True))
    async with FakeQmp(run.qmp), open_herd() as herd:
        await autostarted()
        assert helper.started == []
        assert herd.find("web").instance.state is State.RUNNING


@pytest.mark.usefixtures("boot")
async def test_a_helper_that_comes_later_is_waited_for(directory: Path, open_herd: Open) -> None:
    await stored(directory, replace(WANTED), replace(RUNNING, name="db", uid=str(uuid4()), autostart=True))
    late = FakeHelper()
    late.refusal = REFUSAL
    async with open_herd() as herd:
        web = herd.find("web")
        await web.until(lambda: web.instance.state is State.STARTING)
        assert herd.find("db").instance.state in {State.RUNNING, State.UNKNOWN}
        async with fake_helper(directory / "qemu.sock", late):
            await autostarted()
    assert {machine.name for machine in late.started} == {"web", "db"}


@pytest.mark.usefixtures("boot")
async def test_a_controller_that_takes_over_in_the_middle_starts_nothing_twice(
    directory: Path, helper: FakeHelper, open_herd: Open
) -> None:
    await stored(directory, WANTED)
    async with open_herd() as herd:
        await autostarted()
        store = herd.find("web").world.store
        await store.transact([Put(BOOT_KEY, None)])  # as if it had ended before the last one was through
    async with open_herd() as herd:
        await autostarted()
        assert len(helper.started) == 1


@pytest.mark.usefixtures("boot")
async def test_who_is_told_to_stay_as_it_is_while_the_helper_is_waited_for_stays(
    directory: Path, open_herd: Open
) -> None:
    await stored(directory, replace(RUNNING, autostart=True))
    late = FakeHelper()
    async with open_herd() as herd:
        await herd.update("web", wants_autostart=False)
        async with fake_helper(directory / "qemu.sock", late):
            await autostarted()
        assert herd.find("web").instance.state is State.FAILED
    assert late.started == []


async def test_a_boot_id_that_cannot_be_read_is_logged_and_starts_nothing(
    directory: Path, helper: FakeHelper, open_herd: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autostart, "BOOT_ID", directory / "none")
    await stored(directory, WANTED)
    with structlog.testing.capture_logs() as logs:
        async with open_herd() as herd:
            await autostarted()
            assert herd.find("web").instance.state is State.STOPPED
    assert helper.started == []
    [error] = [log["error"] for log in logs if log["event"].startswith("autostart is off")]
    assert "No such file" in error
    assert not [log for log in logs if log["event"] == "a task crashed"]


def test_the_hosts_boot_has_an_id() -> None:
    assert UUID(autostart.BOOT_ID.read_text().strip())
