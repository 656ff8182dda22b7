"""The table of processes, with other programs in QEMU's place."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from vmherd.model.errors import FailedPrecondition, NotFound
from vmherd.model.layout import RunDirectory
from vmherd.model.machine import KernelBoot, Machine
from vmherd.qemu.files import Owners
from vmherd.qemu.network.rules import Port
from vmherd.qemu.process import Process, read_record, write_record
from vmherd.qemu.process_table import Launch, ProcessTable

pytestmark = pytest.mark.anyio

MACHINE = Machine("6b1f3b0e-5f0c-4b54-9d3c-0123456789ab", "vm", 1, 1, 128, KernelBoot("/kernel", "", ""))
OTHER = replace(MACHINE, uid="00000000-0000-0000-0000-000000000000", name="other")
FAILS = ("/bin/sh", "-c", "echo broken >&2; exit 3")
SITS = ("/bin/sleep", "60")
OWN = Owners(os.geteuid(), os.getegid(), machines=None)
PORT = Port("office", "vm0123456789a0", "52:54:00:12:34:56", "10.20.30.2")


def launch(*argv: str, ports: tuple[Port, ...] = ()) -> Launch:
    return Launch(os.geteuid(), lambda _sockets: argv, ports=ports)


def plan(*argv: str, ports: tuple[Port, ...] = ()) -> Callable[[], AbstractAsyncContextManager[Launch]]:
    @asynccontextmanager
    async def planned() -> AsyncIterator[Launch]:
        yield launch(*argv, ports=ports)

    return planned


def never() -> AbstractAsyncContextManager[Launch]:
    raise AssertionError("no command line is needed")


class Unplugged(list[str]):
    """In the place of the networks: the uids of the machines that were unplugged."""

    async def unplug(self, uid: str) -> None:
        await asyncio.sleep(0)
        self.append(uid)


def children() -> set[int]:
    """Every child of this process, the dead that nobody has waited for among them."""
    threads = Path("/proc/self/task").iterdir()
    return {int(pid) for thread in threads for pid in (thread / "children").read_text().split()}


@pytest.fixture
async def directory() -> AsyncIterator[RunDirectory]:
    with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as path:
        directory = RunDirectory(Path(path))
        directory.instances.mkdir()
        yield directory


@pytest.fixture
def unplugged() -> Unplugged:
    return Unplugged()


@pytest.fixture
async def table(directory: RunDirectory, unplugged: Unplugged) -> AsyncIterator[ProcessTable]:
    before = children()
    table = ProcessTable(directory, OWN, unplugged.unplug)
    yield table
    for process in table.list():
        await table.stop(process.uid, process.generation, grace_s=0)
    await table.close()
    assert children() == before


@asynccontextmanager
async def start_under_way(table: ProcessTable) -> AsyncIterator[tuple[asyncio.Event, asyncio.Task[Process]]]:
    """A start that waits for its plan, and the event that lets it go on.

    A task that was made before the event is set takes its first step before the start goes on.
    """
    asked, go_on = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def held() -> AsyncIterator[Launch]:
        asked.set()
        await go_on.wait()
        yield launch(*SITS)

    start = asyncio.create_task(table.start(MACHINE, held))
    try:
        async with asyncio.timeout(60):
            await asked.wait()
            yield go_on, start
    finally:
        start.cancel()
        await asyncio.wait({start})


async def refused(table: ProcessTable, *argv: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        await table.start(MACHINE, plan(*argv))
    assert caught.value.reason == "QEMU_DID_NOT_START"
    return caught.value


async def end_of(table: ProcessTable, machine: Machine) -> Process:
    """What a watch tells of the end of a machine's process, once it has ended."""
    async with asyncio.timeout(60), aclosing(table.watch()) as processes:
        async for process in processes:
            if process is not None and process.uid == machine.uid and process.ended:
                assert process.generation == machine.generation
                return process
    raise AssertionError("a watch has no end")


async def test_a_slow_watcher_delays_nobody_and_gets_the_last_of_each(table: ProcessTable) -> None:
    slow, quick = table.watch(), table.watch()
    assert await anext(slow) is None
    assert await anext(quick) is None
    for generation in (1, 2, 3):
        await table.start(replace(MACHINE, generation=generation), plan(*FAILS))
        async with asyncio.timeout(60):
            while True:
                seen = await anext(quick)
                assert seen is not None
                assert seen.generation == generation
                if seen.ended:
                    break
    await table.start(OTHER, plan(*FAILS))
    await end_of(table, OTHER)
    async with asyncio.timeout(60):
        assert [await anext(slow), await anext(slow)] == list(table.list())
    await slow.aclose()
    await quick.aclose()


async def test_a_watcher_that_comes_later_gets_what_is_there_first(table: ProcessTable) -> None:
    await table.start(MACHINE, plan(*SITS))
    watch = table.watch()
    async with asyncio.timeout(60):
        assert [await anext(watch), await anext(watch)] == [*table.list(), None]
    await watch.aclose()


async def test_a_start_answers_at_once_with_a_recorded_process(table: ProcessTable, directory: RunDirectory) -> None:
    async with asyncio.timeout(60):
        process = await table.start(MACHINE, plan(*SITS))
    assert not process.ended
    assert process.pid in children()
    assert table.list() == (process,)
    assert read_record(directory.instance(MACHINE.uid).process) == process
    assert await table.start(MACHINE, never) == process  # the same start, so the same process


async def test_a_program_that_fails_is_told_with_its_exit_code_and_last_words(
    table: ProcessTable, directory: RunDirectory
) -> None:
    started = await table.start(MACHINE, plan(*FAILS))
    assert not started.ended
    ended = await end_of(table, MACHINE)
    assert (ended.exit_code, ended.signal, ended.stderr_tail) == (3, None, "broken")
    assert ended.pid == started.pid
    assert table.list() == (ended,)
    assert read_record(directory.instance(MACHINE.uid).process) == ended
    assert await table.start(MACHINE, never) == ended


async def test_a_program_that_cannot_be_executed_leaves_nothing(table: ProcessTable, directory: RunDirectory) -> None:
    error = await refused(table, "/nonexistent/qemu")
    assert "/nonexistent/qemu" in error.message
    assert table.list() == ()
    assert os.listdir(directory.instances) == []


@pytest.mark.parametrize("name", ["start_ticks", "os.pidfd_open"])
async def test_a_process_that_cannot_be_watched_is_ended(
    table: ProcessTable, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It would run on unknown, and the next start of the machine would be a second one."""

    def too_many(_pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = children(), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(f"vmherd.qemu.process_table.{name}", too_many)
        error = await refused(table, *SITS)
    assert "Too many open files" in error.message
    assert table.list() == ()
    assert os.listdir(directory.instances) == []
    assert (children(), len(os.listdir("/proc/self/fd"))) == before


async def test_an_end_is_told_even_if_its_last_words_cannot_be_read(
    table: ProcessTable, directory: RunDirectory
) -> None:
    await table.start(MACHINE, plan(*SITS))
    stderr = directory.instance(MACHINE.uid).stderr
    stderr.unlink()
    stderr.mkdir()
    async with asyncio.timeout(5):
        stopped = await table.stop(MACHINE.uid, 1, grace_s=0)
    assert (stopped.ended, stopped.stderr_tail) == (True, "")
    stderr.rmdir()


async def test_a_run_directory_that_cannot_be_written_fails_the_start(
    table: ProcessTable, directory: RunDirectory
) -> None:
    directory.instance(MACHINE.uid).path.touch()
    error = await refused(table, *FAILS)
    assert "File exists" in error.message or "Not a directory" in error.message
    assert table.list() == ()


async def test_a_link_in_place_of_the_run_directory_is_not_followed(
    table: ProcessTable, directory: RunDirectory
) -> None:
    elsewhere = directory.path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "qmp.sock").touch()
    directory.instance(MACHINE.uid).path.symlink_to(elsewhere)
    await refused(table, *FAILS)
    with pytest.raises(FailedPrecondition):
        await table.release(MACHINE.uid)
    assert os.listdir(elsewhere) == ["qmp.sock"]


async def test_a_caller_who_gives_up_at_any_moment_leaves_no_process_or_a_recorded_one(
    table: ProcessTable, directory: RunDirectory
) -> None:
    @asynccontextmanager
    async def planned() -> AsyncIterator[Launch]:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        yield launch(*SITS)

    before = children()
    given_up = []
    for turns in range(6):
        machine = replace(MACHINE, uid=f"given-up-after-{turns}-turns")
        start = asyncio.create_task(table.start(machine, planned))
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait({start})
        given_up.append(start.cancelled())
        if not start.cancelled():
            assert read_record(directory.instance(machine.uid).process) == start.result()
            assert table.list()[-1] == start.result()
    assert given_up == sorted(given_up, reverse=True)
    assert len(set(given_up)) == 2  # some were in time and some were not
    assert len(table.list()) == len(os.listdir(directory.instances)) == given_up.count(False)
    assert {process.pid for process in table.list()} == children() - before


async def test_a_stop_waits_for_the_start_under_way_and_ends_its_process(table: ProcessTable) -> None:
    async with start_under_way(table) as (go_on, start):
        stop = asyncio.create_task(table.stop(MACHINE.uid, 1, grace_s=0))
        go_on.set()
        stopped = await stop
        assert stopped.pid == (await start).pid
        assert stopped.signal == signal.SIGKILL
        assert table.list() == (stopped,)


async def test_a_stop_finds_nothing_once_the_start_under_way_was_given_up(table: ProcessTable) -> None:
    async with start_under_way(table) as (go_on, start):
        stop = asyncio.create_task(table.stop(MACHINE.uid, 1, grace_s=0))
        go_on.set()
        start.cancel()
        with pytest.raises(NotFound):
            await stop
        assert start.cancelled()
        assert table.list() == ()


async def test_a_release_waits_for_the_start_under_way_and_leaves_its_process(
    table: ProcessTable, directory: RunDirectory
) -> None:
    async with start_under_way(table) as (go_on, start):
        release = asyncio.create_task(table.release(MACHINE.uid))
        go_on.set()
        with pytest.raises(FailedPrecondition) as caught:
            await release
        assert caught.value.reason == "PROCESS_RUNS"
        process = await start
        assert table.list() == (process,)
        assert read_record(directory.instance(MACHINE.uid).process) == process


async def test_a_start_under_way_delays_no_other_machine(table: ProcessTable) -> None:
    async with start_under_way(table) as (go_on, start):
        await table.start(OTHER, plan(*SITS))
        await table.stop(OTHER.uid, 1, grace_s=0)
        await table.release(OTHER.uid)
        assert not start.done()
        go_on.set()
        process = await start
        assert table.list() == (process,)


async def test_a_stop_that_waits_for_the_end_delays_nobody(table: ProcessTable) -> None:
    process = await table.start(MACHINE, plan(*SITS))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    # Once it has halted, SIGTERM does not end it.
    await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    patient = asyncio.create_task(table.stop(MACHINE.uid, 1, grace_s=60))
    await asyncio.sleep(0)  # it has sent SIGTERM and waits
    async with asyncio.timeout(60):
        assert await table.start(MACHINE, never) == process
        assert not patient.done()
        stopped = await table.stop(MACHINE.uid, 1, grace_s=0)
        assert await patient == stopped
    assert stopped.signal == signal.SIGKILL


async def test_an_end_is_told_even_if_it_cannot_be_recorded(table: ProcessTable, directory: RunDirectory) -> None:
    await table.start(MACHINE, plan(*SITS))
    run = directory.instance(MACHINE.uid)
    run.path.rename(directory.path / "gone")
    stopped = await table.stop(MACHINE.uid, 1, grace_s=0)
    assert stopped.ended
    assert table.list() == (stopped,)


async def test_a_start_without_a_process_is_forgotten_even_beside_a_foreign_file(
    table: ProcessTable, directory: RunDirectory
) -> None:
    await table.start(MACHINE, plan(*FAILS))
    process = await end_of(table, MACHINE)
    run = directory.instance(MACHINE.uid)
    write_record(run.process, replace(process, pid=None, start_ticks=None, ended_at_s=None, exit_code=None))
    (run.path / "foreign").touch()
    later = ProcessTable(directory, OWN, Unplugged().unplug)
    later.adopt()
    assert later.list() == ()
    assert os.listdir(run.path) == ["foreign"]


async def test_a_machine_is_unplugged_once_it_has_ended(table: ProcessTable, unplugged: Unplugged) -> None:
    await table.start(OTHER, plan(*FAILS))
    await end_of(table, OTHER)
    process = await table.start(MACHINE, plan(*SITS, ports=(PORT,)))
    assert table.running() == (process,)
    assert process.ports == (PORT,)
    await table.stop(MACHINE.uid, 1, grace_s=0)
    assert table.running() == ()
    await table.close()  # waits for what is under way
    assert unplugged == [MACHINE.uid]  # the other had no ports


async def test_the_end_of_one_start_does_not_unplug_the_next(table: ProcessTable, unplugged: Unplugged) -> None:
    @asynccontextmanager
    async def planned() -> AsyncIterator[Launch]:
        unplugged.append("and plugged in again")
        yield launch(*SITS, ports=(PORT,))

    await table.start(MACHINE, plan(*SITS, ports=(PORT,)))
    await table.stop(MACHINE.uid, 1, grace_s=0)
    await table.start(replace(MACHINE, generation=2), planned)
    with pytest.raises(FailedPrecondition):
        await table.release(MACHINE.uid)  # has to wait for what the end of the first one had to do
    assert unplugged[-1] == "and plugged in again"
    assert set(unplugged[:-1]) == {MACHINE.uid}


async def test_a_socket_takes_connections_as_soon_as_its_process_is_there(
    table: ProcessTable, directory: RunDirectory
) -> None:
    inherited: list[int] = []

    def argv(sockets: Sequence[int]) -> tuple[str, ...]:
        inherited.extend(sockets)
        return SITS

    @asynccontextmanager
    async def planned() -> AsyncIterator[Launch]:
        yield Launch(os.geteuid(), argv)

    process = await table.start(MACHINE, planned)
    run = directory.instance(MACHINE.uid)
    links = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in inherited]
    assert len(links) == 3
    assert all(link.startswith("socket:") for link in links)
    for path in run.sockets:
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()
        await writer.wait_closed()
    await table.stop(MACHINE.uid, 1, grace_s=0)
    for path in run.sockets:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_unix_connection(path)
