"""What one supervisor makes of what it is told, in whatever order that comes; without a helper that would answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.framework.fake_agent import FakeAgent
from tests.framework.fake_qmp import FakeQmp, event
from vmherd.controller.helper import Helper, Process
from vmherd.controller.store import SqliteStore
from vmherd.controller.supervisor import Supervisor
from vmherd.controller.tasks import cancelled
from vmherd.controller.world import World
from vmherd.image.registry import ImageRegistry
from vmherd.model.instance import Cause, Hardware, Instance, Operation, Verb, started
from vmherd.model.layout import InstanceRun, RunDirectory, StateDirectory
from vmherd.model.lifecycle import State
from vmherd.model.readiness import Rung
from vmherd.rpc.channel import open_channel

pytestmark = pytest.mark.anyio
DEADLINE_S = 5.0
UID = "6b6a2c52-93f5-4a6c-8d3e-7f1f1c7f6f01"
STOPPED = Instance("web", UID, "idle", Hardware(1, 32), {}, 0.0)
STARTING = replace(started(STOPPED, 1.0), operation=Operation("op", Verb.LAUNCH))
RUNNING = replace(STARTING, state=State.RUNNING, operation=None)
ALIVE = Process(UID, 1, pid=42)
ENDED = replace(ALIVE, ended_at_s=2.0, exit_code=0)
AGENT_OPENS = event("VSERPORT_CHANGE", id="agent0", open=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="s-") as path:
        yield Path(path)


@pytest.fixture
def run(directory: Path) -> InstanceRun:
    """Where the instance's sockets are."""
    run = RunDirectory(directory).instance(UID)
    run.path.mkdir(parents=True)
    return run


@pytest.fixture
async def world(directory: Path) -> AsyncIterator[World]:
    state = StateDirectory(directory / "state")
    image = state.images / "idle"
    image.mkdir(parents=True)
    for name in ("kernel", "initramfs"):
        (image / name).touch()
    description = {"version": "1", "command_line": "", "default_cpus": 1, "default_memory_mib": 32}
    (image / "image.json").write_text(json.dumps(description))
    store = SqliteStore(state.store)
    nobody = directory / "no-helper.sock"
    async with open_channel(nobody) as channel:
        yield World(
            store, Helper(channel, str(nobody)), ImageRegistry(state.images), RunDirectory(directory), state, 1.0
        )
    await store.close()


@asynccontextmanager
async def supervising(world: World, instance: Instance) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(world, instance, 0)
    running = asyncio.create_task(supervisor.run())
    async with asyncio.timeout(DEADLINE_S):
        yield supervisor
    await cancelled(running)
    assert running.cancelled()


def reached(supervisor: Supervisor, rung: Rung) -> bool:
    return supervisor.instance.readiness.reached == rung


async def test_the_control_socket_is_the_helpers_until_it_has_answered_the_start(
    world: World, run: InstanceRun
) -> None:
    async with supervising(world, STARTING) as supervisor, FakeQmp(run.qmp) as qemu:
        supervisor.process_seen(ALIVE)
        await supervisor.until(lambda: reached(supervisor, Rung.PROCESS))
        assert not qemu.connected.is_set()
        supervisor.process_started(ALIVE)
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        assert supervisor.instance.state is State.RUNNING


async def test_why_qemu_ended_is_known_also_when_its_end_is_told_first(world: World, run: InstanceRun) -> None:
    async with supervising(world, RUNNING) as supervisor, FakeQmp(run.qmp) as qemu:
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        supervisor.process_seen(ENDED)
        qemu.say(event("SHUTDOWN", guest=True, reason="guest-panic"))
        qemu.hang_up()
        await supervisor.until(supervisor.ended.is_set)
        await supervisor.until(lambda: supervisor.instance.state is State.FAILED)
        assert supervisor.instance.last_exit is not None
        assert supervisor.instance.last_exit.cause is Cause.GUEST_PANIC


async def test_a_machine_that_the_helper_does_not_know_is_gone_unless_it_answers(
    world: World, run: InstanceRun
) -> None:
    async with supervising(world, RUNNING) as supervisor:
        async with FakeQmp(run.qmp):
            await supervisor.until(lambda: reached(supervisor, Rung.QMP))
            supervisor.process_not_seen()
            await supervisor.changed.wait()
            assert supervisor.instance.state is State.RUNNING
        await supervisor.monitor.hung_up()
        supervisor.process_not_seen()
        await supervisor.until(lambda: supervisor.instance.state is State.FAILED)
        assert supervisor.instance.last_exit is not None
        assert supervisor.instance.last_exit.cause is Cause.VANISHED


async def test_a_machine_that_is_being_started_need_not_be_known_yet(world: World) -> None:
    stepped_on = replace(STARTING, readiness=RUNNING.readiness.climb(Rung.PROCESS, now_s=2.0, accepted_at_s=1.0))
    for instance in (STARTING, stepped_on):
        async with supervising(world, instance) as supervisor:
            supervisor.process_not_seen()
            await supervisor.changed.wait()
            assert supervisor.instance.state is State.STARTING


async def test_an_agents_port_that_opens_while_open_was_closed_in_between(world: World, run: InstanceRun) -> None:
    async with supervising(world, RUNNING) as supervisor, FakeQmp(run.qmp) as qemu, FakeAgent(run.agent) as agent:
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        for _ in range(2):
            clients, changed = agent.clients, supervisor.changed
            qemu.say(AGENT_OPENS)
            await changed.wait()
            await supervisor.until(lambda: reached(supervisor, Rung.AGENT))
            assert agent.clients == clients + 1


async def test_lost_and_found(world: World, run: InstanceRun) -> None:
    async with supervising(world, RUNNING) as supervisor:
        supervisor.helper_lost()
        world.helper.lost = True
        await supervisor.until(lambda: supervisor.instance.state is State.UNKNOWN)
        supervisor.process_seen(ALIVE)
        await supervisor.until(lambda: supervisor.instance.state is State.RUNNING)


async def test_news_of_another_start_are_no_news(world: World) -> None:
    async with supervising(world, RUNNING) as supervisor:
        before = supervisor.instance
        for generation in (0, 2):
            changed = supervisor.changed
            supervisor.process_seen(replace(ENDED, generation=generation))
            await changed.wait()
        assert supervisor.instance == before
