"""Programs that outlive their callers: an agent that tells what the test wants, and programs that really run."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import glob
import secrets
import shlex
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.guest_agent.conftest import QemuGa
from tests.framework.fake_agent import FakeAgent, Request, value
from tests.framework.fake_qmp import FakeQmp, event
from tests.unit.controller.conftest import (
    AGENT_OPENS,
    DEADLINE_S,
    ENDED,
    RUNNING,
    UID,
    reached,
    supervising,
    with_agent,
)
from vmherd.controller import process_tracker
from vmherd.controller.detached import Detached
from vmherd.controller.process_records import PROCESSES, ProcessRecord, ProcessState, decode_process
from vmherd.controller.process_tracker import PROCESSES_MAX, ProcessTracker
from vmherd.controller.store import Put, Store, StoreError
from vmherd.controller.supervisor import Supervisor
from vmherd.controller.world import World
from vmherd.guest_agent import Stream, spool
from vmherd.model.errors import FailedPrecondition, NotFound, ResourceExhausted
from vmherd.model.layout import InstanceRun
from vmherd.model.lifecycle import State
from vmherd.model.readiness import Rung

pytestmark = pytest.mark.anyio

BOOT_ID = "5b0e3f6a"
SIGCONT = 18
COMMANDS = {
    *("guest-ping", "guest-sync", "guest-sync-delimited", "guest-info", "guest-exec", "guest-exec-status"),
    *("guest-file-open", "guest-file-read", "guest-file-seek", "guest-file-close"),
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks often, and so no test waits long."""
    monkeypatch.setattr(process_tracker, "PAUSE_MAX_S", 0.02)
    monkeypatch.setattr(process_tracker, "RETRY_S", 0.02)


class Disk:
    """A store whose disk can be full."""

    def __init__(self, store: Store) -> None:
        self.full = False
        self._store = store

    async def transact(self, puts: Sequence[Put], compares: Sequence[Any] = ()) -> int:
        if self.full:
            raise StoreError("database or disk is full")
        return await self._store.transact(puts, compares)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@dataclass
class Guest:
    """A guest whose programs are tracked."""

    supervisor: Supervisor
    qemu: FakeQmp
    agent: FakeAgent
    disk: Disk
    tracker: ProcessTracker

    async def run(self, *command: str, **fields: Any) -> ProcessRecord:
        """A program that was started by an earlier controller, and that the tracker takes up."""
        arguments = {"path": command[0], "arg": list(command[1:]), "capture-output": True}
        answer: Any = await self.supervisor.open_agent().execute("guest-exec", arguments, timeout_s=DEADLINE_S)
        return self.take_up(pid=answer["pid"], command=command, **fields)

    def take_up(self, **fields: Any) -> ProcessRecord:
        defaults: dict[str, Any] = {
            "id": f"p{len(self.tracker.records)}",
            "command": ("sleep",),
            "boot_id": BOOT_ID,
            "pid": 7,
        }
        record = ProcessRecord(uid=UID, started_at_s=1.0, generation=1, **(defaults | fields))
        self.tracker.take_up(record)
        return record

    async def until(self, process_id: str, state: ProcessState) -> ProcessRecord:
        """The record, once it is stored with this state."""
        return await stored(self.disk, process_id, state)

    async def pause(self) -> None:
        self.qemu.say(event("STOP"))
        await self.supervisor.until(lambda: self.supervisor.instance.state is State.PAUSED)

    async def resume(self) -> None:
        self.qemu.say(event("RESUME"))
        await self.supervisor.until(lambda: self.supervisor.instance.state is State.RUNNING)


async def stored(store: Disk, process_id: str, state: ProcessState) -> ProcessRecord:
    async for change in store.watch(PROCESSES, 0):
        if change.value and (record := decode_process(change.value)).id == process_id and record.state is state:
            return record
    raise AssertionError("the store was closed")


def boots(agent: FakeAgent, boot_id: str) -> None:
    """Lets the agent say in which boot its guest is."""
    data = boot_id.encode()
    agent.answers |= {
        "guest-file-open": value(1),
        "guest-file-read": value({"count": len(data), "buf-b64": base64.b64encode(data).decode(), "eof": True}),
        "guest-file-close": value({}),
    }


@asynccontextmanager
async def tracking(supervisor: Supervisor, store: Disk) -> AsyncIterator[ProcessTracker]:
    tracker = ProcessTracker(supervisor, store, lambda: None)
    try:
        yield tracker
    finally:
        await tracker.close()


@pytest.fixture
async def guest(world: World, run: InstanceRun) -> AsyncIterator[Guest]:
    disk = Disk(world.store)
    async with with_agent(world, run) as (supervisor, qemu, agent), tracking(supervisor, disk) as tracker:
        boots(agent, BOOT_ID)
        yield Guest(supervisor, qemu, agent, disk, tracker)


async def test_the_end_of_a_program_is_seen_and_stored(guest: Guest) -> None:
    record = await guest.run("sh", "-c", "exit 3")
    ended = await guest.until(record.id, ProcessState.EXITED)
    assert (ended.exit_code, ended.signal, ended.reason) == (3, None, "")
    assert ended.ended_at_s is not None
    assert ended.ended_at_s > ended.started_at_s


async def test_a_program_is_ended_when_its_time_is_up(guest: Guest) -> None:
    late = await guest.run("sleep", "60", deadline_at_s=time.time() - 1)
    in_time = await guest.run("sleep", "60", deadline_at_s=time.time() + 60)
    ended = await guest.until(late.id, ProcessState.EXITED)
    assert (ended.exit_code, ended.signal, ended.reason) == (128 + 15, 15, "its time was up")
    assert guest.tracker.get(in_time.id) == in_time


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"boot_id": "another"}, "the guest was started anew"),
        ({"generation": 0}, "the instance was stopped"),
        ({"pid": 1}, "the guest's agent does not know it any more: it was started anew"),
    ],
)
async def test_a_program_of_another_guest_or_agent_is_lost(guest: Guest, fields: dict[str, Any], reason: str) -> None:
    runs = await guest.run("sleep", "60")
    lost = replace(guest.take_up(), **fields)
    guest.tracker.take_up(lost)
    assert (await guest.until(lost.id, ProcessState.LOST)).reason == reason
    assert guest.tracker.get(runs.id).state is ProcessState.RUNNING
    with pytest.raises(FailedPrecondition, match="it is LOST"):
        await guest.tracker.signal(lost.id, 15)


async def test_a_stop_of_the_instance_loses_what_ran_and_nothing_that_had_ended(guest: Guest) -> None:
    ended = await guest.until((await guest.run("true")).id, ProcessState.EXITED)
    runs = await guest.run("sleep", "60")
    guest.qemu.hang_up()
    guest.supervisor.process_seen(ENDED)
    assert (await guest.until(runs.id, ProcessState.LOST)).reason == "the instance was stopped"
    assert guest.tracker.get(ended.id) == ended


class Late:
    """An answer that waits: `asked` tells that the agent has the request, `release` lets it answer."""

    def __init__(self, reply: Callable[[Request], bytes]) -> None:
        self.asked = asyncio.Event()
        self.release = asyncio.Event()
        self._reply = reply

    async def __call__(self, request: Request) -> bytes:
        self.asked.set()
        await self.release.wait()
        return self._reply(request)


async def test_what_was_seen_to_end_is_not_lost_after_that(guest: Guest) -> None:
    """Two looks at once: one is told of the end, and the other one, begun before that, finds the guest reset."""
    status = Late(lambda request: request.success({"exited": True, "exitcode": 0}))
    guest.agent.answers["guest-exec-status"] = status
    record = guest.take_up()
    await status.asked.wait()
    signalling = asyncio.create_task(guest.tracker.signal(record.id, SIGCONT))
    await asyncio.sleep(0)  # it has begun
    boots(guest.agent, "another")
    status.release.set()
    with pytest.raises(FailedPrecondition, match="it is EXITED"):
        await signalling
    assert (await guest.until(record.id, ProcessState.EXITED)).exit_code == 0
    assert guest.tracker.get(record.id).reason == ""


async def test_an_end_that_could_not_be_stored_is_not_forgotten(guest: Guest) -> None:
    guest.disk.full = True
    record = await guest.run("sh", "-c", "exit 3")

    async def signal_for_ever() -> None:
        while True:
            await guest.tracker.signal(record.id, SIGCONT)

    with pytest.raises(ResourceExhausted, match="database or disk is full") as raised:
        await signal_for_ever()  # until it has ended
    assert raised.value.reason == "STORE_FAILED"
    assert guest.tracker.get(record.id).state is ProcessState.RUNNING
    guest.disk.full = False
    assert (await guest.until(record.id, ProcessState.EXITED)).exit_code == 3


async def test_a_guest_that_is_paused_in_the_middle_of_a_look_is_looked_at_again(guest: Guest) -> None:
    status = Late(lambda request: request.success({"exited": False}))
    guest.agent.answers["guest-exec-status"] = status
    first, second = guest.take_up(pid=1), guest.take_up(pid=2)
    await status.asked.wait()
    agent = guest.supervisor.open_agent()
    await guest.pause()
    del guest.agent.answers["guest-exec-status"]
    status.release.set()
    await agent.execute("guest-ping", timeout_s=DEADLINE_S)  # the look has had its answer
    await guest.resume()
    for record in (first, second):
        await guest.until(record.id, ProcessState.LOST)  # which only one who looks can tell


async def test_a_frozen_guest_loses_nothing(guest: Guest) -> None:
    record = await guest.run("sleep", "60")
    asked: asyncio.Queue[None] = asyncio.Queue()

    async def frozen(request: Request) -> bytes:
        asked.put_nowait(None)
        return request.failure("CommandNotFound", "Command has been disabled: the agent is in frozen state")

    guest.agent.answers["guest-file-open"] = frozen
    for _ in range(3):
        await asked.get()
    assert guest.tracker.get(record.id) == record


async def test_there_is_a_most(guest: Guest) -> None:
    for number in range(PROCESSES_MAX):
        guest.take_up(id=f"{number}", state=ProcessState.EXITED)
    with pytest.raises(ResourceExhausted) as raised:
        await guest.tracker.start(["true"], env=None, input_data=b"", timeout_s=None)
    assert raised.value.reason == "TOO_MANY_PROCESSES"


async def test_one_that_runs_is_deleted_only_by_force(guest: Guest) -> None:
    record = await guest.run("sleep", "60")
    with pytest.raises(FailedPrecondition, match="it runs; signal it first, or force it"):
        await guest.tracker.delete(record.id, force=False)
    guest.disk.full = True
    with pytest.raises(ResourceExhausted):
        await guest.tracker.delete(record.id, force=True)
    assert guest.tracker.get(record.id)
    guest.disk.full = False
    await guest.tracker.delete(record.id, force=True)
    with pytest.raises(NotFound):
        guest.tracker.get(record.id)
    assert (await guest.disk.list(PROCESSES))[0] == []


@dataclass
class RealGuest:
    """The same with the real agent, which opens files."""

    supervisor: Supervisor
    agent: QemuGa
    disk: Disk


@pytest.fixture
async def real(world: World, run: InstanceRun) -> AsyncIterator[RealGuest]:
    agent = QemuGa(run.agent, harmless=COMMANDS)
    await agent.start()
    try:
        async with supervising(world, RUNNING) as supervisor, FakeQmp(run.qmp) as qemu:
            await supervisor.until(lambda: reached(supervisor, Rung.QMP))
            qemu.say(AGENT_OPENS)
            await supervisor.until(lambda: reached(supervisor, Rung.AGENT))
            yield RealGuest(supervisor, agent, Disk(world.store))
    finally:
        await agent.stop()


async def start(tracker: ProcessTracker, *command: str) -> ProcessRecord:
    return await tracker.start(command, env=None, input_data=b"", timeout_s=None)


async def text_of(tracker: ProcessTracker, process_id: str) -> str:
    async with contextlib.aclosing(tracker.follow(process_id, {}, wait=True)) as pieces:
        return "".join([piece.data.decode() async for piece in pieces if piece.stream is Stream.STDOUT])


async def test_another_controller_takes_up_what_runs(real: RealGuest, directory: Path) -> None:
    release = directory / "release"
    first = Detached(real.disk)
    record = await start(first.of(real.supervisor), "sh", "-c", f"echo 1; until [ -e {release} ]; do :; done; echo 2")
    await first.close()
    second = Detached(real.disk)
    await second.open([real.supervisor])
    tracker = second.of(real.supervisor)
    try:
        assert tracker.records == [record]
        following = asyncio.create_task(text_of(tracker, record.id))
        release.touch()
        assert await following == "1\n2\n"
        assert (await stored(real.disk, record.id, ProcessState.EXITED)).exit_code == 0
        await tracker.delete(record.id, force=False)
    finally:
        await second.close()
    assert (await real.disk.list(PROCESSES))[0] == []


async def test_a_program_that_cannot_be_stored_leaves_nothing(real: RealGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    token = secrets.token_hex(16)
    monkeypatch.setattr(spool, "new_token", lambda: token)
    real.disk.full = True
    async with tracking(real.supervisor, real.disk) as tracker:
        with pytest.raises(ResourceExhausted, match="could not be stored and was ended"):
            await start(tracker, "sleep", "61.25")
        assert tracker.records == []
    assert glob.glob(f"/tmp/*{token}*", include_hidden=True) == []
    assert not runs("sleep", "61.25")


def runs(*command: str) -> bool:
    return subprocess.run(["pgrep", "-fx", shlex.join(command)], capture_output=True, check=False).returncode == 0
