"""One supervisor, with a control socket and a guest agent that say what a test wants, and without a helper."""

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
from vmherd.controller.herd import Herd
from vmherd.controller.store import SqliteStore
from vmherd.controller.supervisor import Supervisor
from vmherd.controller.tasks import cancelled
from vmherd.controller.world import World
from vmherd.image.registry import ImageRegistry
from vmherd.model.instance import Hardware, Instance, NetworkInterface, Operation, Verb, started
from vmherd.model.layout import InstanceRun, RunDirectory, StateDirectory
from vmherd.model.lifecycle import State
from vmherd.model.machine import mac_of
from vmherd.model.readiness import Rung
from vmherd.rpc.channel import open_channel

DEADLINE_S = 30.0
UID = "6b6a2c52-93f5-4a6c-8d3e-7f1f1c7f6f01"
STOPPED = Instance("web", UID, "idle", Hardware(1, 32), {}, 0.0, nics=(NetworkInterface("user", mac_of(UID)),))
STARTING = replace(started(STOPPED, 1.0), operation=Operation("op", Verb.LAUNCH))
RUNNING = replace(STARTING, state=State.RUNNING, operation=None)
ALIVE = Process(UID, 1, pid=42)
ENDED = replace(ALIVE, ended_at_s=2.0, exit_code=0)
AGENT_OPENS = event("VSERPORT_CHANGE", id="agent0", open=True)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One event loop for all tests that ask for it to be kept."""
    return "asyncio"


@pytest.fixture(scope="session")
async def kept_loop() -> None:
    """Keeps the event loop open.

    Of the end of a call gRPC learns late. If the call's loop is closed by then, that is an error in whatever loop runs.
    """


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
async def world(directory: Path, kept_loop: None) -> AsyncIterator[World]:
    async with world_in(directory, directory / "no-helper.sock") as world:
        yield world


@asynccontextmanager
async def world_in(directory: Path, helper_socket: Path) -> AsyncIterator[World]:
    """A world with an image, and a helper where somebody serves this socket."""
    state = StateDirectory(directory / "state")
    image = state.images / "idle"
    image.mkdir(parents=True, exist_ok=True)
    for name in ("kernel", "initramfs"):
        (image / name).touch()
    description = {"version": "1", "command_line": "", "default_cpus": 1, "default_memory_mib": 32}
    (image / "image.json").write_text(json.dumps(description))
    store = SqliteStore(state.store)
    async with open_channel(helper_socket) as channel:
        helper = Helper(channel, str(helper_socket))
        yield World(store, helper, ImageRegistry(state.images), RunDirectory(directory), state, 1.0)
    await store.close()


@asynccontextmanager
async def herd_in(world: World) -> AsyncIterator[Herd]:
    """The herd of a world, as each start of a controller opens it."""
    herd = Herd(world)
    await herd.open()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield herd
    finally:
        await herd.close()


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


@asynccontextmanager
async def with_agent(world: World, run: InstanceRun) -> AsyncIterator[tuple[Supervisor, FakeQmp, FakeAgent]]:
    """A running machine whose agent has answered."""
    async with supervising(world, RUNNING) as supervisor, FakeQmp(run.qmp) as qemu, FakeAgent(run.agent) as agent:
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        qemu.say(AGENT_OPENS)
        await supervisor.until(lambda: reached(supervisor, Rung.AGENT))
        yield supervisor, qemu, agent
