"""The helper is ended, killed and started again; the machines run on and no stranger is taken for one."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
import pytest

from tests.integration.qemu.house import DEADLINE_S, POLL_S, House
from vmherd.model.errors import FailedPrecondition
from vmherd.qemu.process import start_ticks
from vmherd.rpc.status import from_rpc_error

pytestmark = pytest.mark.anyio

RUNS = {"ended_at_s": None, "exit_code": None, "signal": None}
"""What a record says of a process that runs."""


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any machine."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_next_helper_has_the_same_process_and_sees_its_end(house: House, number: signal.Signals) -> None:
    machine = house.machine()
    process = await house.start(machine)
    await house.restart(number)
    assert await house.processes() == [process]
    assert await house.start(machine) == process
    async with house.watching() as news:
        os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            ended = await anext(news)
    assert ended.HasField("end_time")
    assert not ended.HasField("exit_code")  # only a parent learns it
    assert not ended.HasField("signal")
    await house.restart(number)
    assert await house.processes() == [ended]


async def test_the_next_helper_can_stop_it(house: House) -> None:
    machine = house.machine()
    process = await house.up(machine)
    await house.restart()
    stopped = await house.stop(machine, grace_s=10)
    assert "terminating on signal 15" in stopped.stderr_tail
    assert stopped.pid == process.pid


async def test_an_end_that_nobody_saw_is_found_out(house: House) -> None:
    process = await house.up(house.machine())
    await house.close(signal.SIGKILL)
    os.kill(process.pid, signal.SIGTERM)
    await house.end_of(process.pid)
    await house.open()
    (ended,) = await house.processes()
    assert ended.HasField("end_time")
    assert "terminating on signal 15" in ended.stderr_tail


async def test_an_orderly_end_ends_watches_and_leaves_machines(house: House) -> None:
    process = await house.up(house.machine())
    async with house.watching() as news:
        started_s = time.monotonic()
        ending = asyncio.create_task(house.helper_ends(signal.SIGTERM))
        with pytest.raises(grpc.aio.AioRpcError):
            await anext(news)
        assert await ending == 0
    assert time.monotonic() - started_s < 30
    assert house.qemu_pids() == [process.pid]
    assert not house.listen.exists()
    await house.open()


async def test_a_recycled_pid_is_neither_adopted_nor_signalled(house: House, stranger: subprocess.Popen[bytes]) -> None:
    machine = house.machine()
    process = await house.start(machine)
    await house.stop(machine)
    await house.close(signal.SIGKILL)
    house.change_record(process.uid, pid=stranger.pid, **RUNS)
    await house.open()
    (found,) = await house.processes()
    assert found.HasField("end_time")
    assert await house.stop(machine) == found
    await house.release(process.uid)
    assert stranger.poll() is None


async def test_after_a_reboot_nothing_runs_whatever_the_pids_say(
    house: House, stranger: subprocess.Popen[bytes]
) -> None:
    machine = house.machine()
    process = await house.start(machine)
    await house.stop(machine)
    await house.close(signal.SIGKILL)
    ticks = start_ticks(stranger.pid)
    house.change_record(process.uid, pid=stranger.pid, start_ticks=ticks, boot_id="another", **RUNS)
    await house.open()
    (found,) = await house.processes()
    assert found.HasField("end_time")
    await house.stop(machine)
    assert stranger.poll() is None


async def test_a_process_that_was_started_but_not_recorded_is_found_by_its_command_line(house: House) -> None:
    machine = house.machine()
    process = await house.up(machine)
    await house.close(signal.SIGKILL)
    house.change_record(process.uid, pid=None, start_ticks=None)
    await house.open()
    assert await house.start(machine) == process
    assert house.qemu_pids() == [process.pid]


async def test_a_start_that_never_came_to_a_process_leaves_no_trace(house: House) -> None:
    machine = house.machine()
    process = await house.start(machine)
    await house.stop(machine)
    await house.close(signal.SIGKILL)
    house.change_record(process.uid, pid=None, start_ticks=None, **RUNS)
    await house.open()
    assert await house.processes() == []
    assert not house.instance(process.uid).path.exists()
    assert (await house.start(machine)).pid != process.pid


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', "[" * 100_000])
async def test_a_record_that_cannot_be_read_is_left_for_a_person(house: House, text: str) -> None:
    other = await house.start(house.machine())
    machine = house.machine()
    await house.close(signal.SIGKILL)
    run = house.instance(machine.uid)
    run.path.mkdir()
    run.process.write_text(text)
    await house.open()
    assert await house.processes() == [other]
    for attempt in (house.start(machine), house.release(machine.uid)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        error = from_rpc_error(refused.value)
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "RECORD_UNREADABLE"
        assert str(run.process) in error.message
    assert run.process.read_text() == text
    run.process.unlink()
    await house.release(machine.uid)


async def test_a_record_under_another_uid_is_left_for_a_person(house: House) -> None:
    machine = house.machine()
    process = await house.up(machine)
    await house.close(signal.SIGKILL)
    moved = house.instance(house.machine().uid)
    house.instance(machine.uid).path.rename(moved.path)
    await house.open()
    assert await house.processes() == []
    assert json.loads(moved.process.read_text())["pid"] == process.pid
    await house.close(signal.SIGKILL)
    moved.path.rename(house.instance(machine.uid).path)
    await house.open()
    assert await house.processes() == [process]


async def test_a_helper_killed_in_the_middle_of_starts_knows_all_of_them_afterwards(house: House) -> None:
    machines = [house.machine() for _ in range(4)]
    starts = [asyncio.create_task(house.start(machine)) for machine in machines]
    await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
    await house.close(signal.SIGKILL)
    await asyncio.gather(*starts, return_exceptions=True)
    await house.open()
    known = {process.pid for process in await house.processes() if not process.HasField("end_time")}
    assert known == set(house.qemu_pids())
    processes = [await house.up(machine) for machine in machines]
    assert sorted(process.pid for process in processes) == sorted(house.qemu_pids())


async def test_a_child_that_a_killed_helper_left_delays_the_next_one_and_no_more(house: House) -> None:
    """Between fork and exec it has the helper's lock."""
    await house.close(signal.SIGKILL)
    path = str(house.run.instances)
    with opened_directory(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        opening = asyncio.create_task(house.open())
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if house.helper is not None and house.helper.returncode is None and path in _open(house.helper.pid):
                    break
                await asyncio.sleep(POLL_S)
        assert not opening.done()
    await opening


@contextmanager
def opened_directory(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(pid: int) -> set[str]:
    """What a process has open."""
    links = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/{pid}/fd/{number}"))
    return links


async def test_a_second_helper_on_the_same_run_directory_is_refused(house: House) -> None:
    process = await house.start(house.machine())
    for listen in (house.settings.listen, str(house.path / "other.sock")):
        code, stderr = await house.second_helper(listen=listen)
        assert code != 0
        assert "another helper works in it" in stderr
    assert await house.processes() == [process]
