"""The table of processes, with other programs in QEMU's place."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vmherd.model.errors import FailedPrecondition
from vmherd.model.layout import RunDirectory
from vmherd.model.machine import KernelBoot, Machine
from vmherd.qemu.process import read_record, write_record
from vmherd.qemu.process_table import ProcessTable

pytestmark = pytest.mark.anyio

MACHINE = Machine("6b1f3b0e-5f0c-4b54-9d3c-0123456789ab", "vm", 1, 1, 128, KernelBoot("/kernel", "", ""))
OTHER = replace(MACHINE, uid="00000000-0000-0000-0000-000000000000", name="other")
FAILS = ("/bin/sh", "-c", "echo broken >&2; exit 3")
SITS = ("/bin/sleep", "60")


def plan(*argv: str) -> Callable[[], Awaitable[tuple[str, ...]]]:
    async def planned() -> tuple[str, ...]:
        return argv

    return planned


async def never() -> tuple[str, ...]:
    raise AssertionError("no command line is needed")


@pytest.fixture
async def directory() -> AsyncIterator[RunDirectory]:
    with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as path:
        directory = RunDirectory(Path(path))
        directory.instances.mkdir()
        yield directory


@pytest.fixture
async def table(directory: RunDirectory) -> AsyncIterator[ProcessTable]:
    table = ProcessTable(directory)
    yield table
    for process in table.list():
        await table.stop(process.uid, process.generation, grace_s=0)
    table.close()


async def fails(table: ProcessTable, machine: Machine, *argv: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        await table.start(machine, plan(*argv))
    assert caught.value.reason == "QEMU_DID_NOT_START"
    return caught.value


async def sitting(table: ProcessTable, machine: Machine) -> None:
    """Starts a process that never answers, and gives up on the answer once it runs."""
    watch = table.watch()
    start = asyncio.create_task(table.start(machine, plan(*SITS)))
    async with asyncio.timeout(10):
        async for process in watch:
            if process is not None and process.uid == machine.uid and not process.ended:
                break
    await watch.aclose()
    start.cancel()
    await asyncio.wait({start})
    assert start.cancelled()


async def test_a_slow_watcher_delays_nobody_and_gets_the_last_of_each(table: ProcessTable) -> None:
    slow, quick = table.watch(), table.watch()
    assert await anext(slow) is None
    assert await anext(quick) is None
    for generation in (1, 2, 3):
        await fails(table, replace(MACHINE, generation=generation), *FAILS)
        async with asyncio.timeout(1):
            while True:
                seen = await anext(quick)
                assert seen is not None
                assert seen.generation == generation
                if seen.ended:
                    break
    await fails(table, OTHER, *FAILS)
    async with asyncio.timeout(1):
        assert [await anext(slow), await anext(slow)] == list(table.list())
    await slow.aclose()
    await quick.aclose()


async def test_a_watcher_that_comes_later_gets_what_is_there_first(table: ProcessTable) -> None:
    await fails(table, MACHINE, *FAILS)
    watch = table.watch()
    async with asyncio.timeout(1):
        assert [await anext(watch), await anext(watch)] == [*table.list(), None]
    await watch.aclose()


async def test_a_failed_start_says_why(table: ProcessTable, directory: RunDirectory) -> None:
    error = await fails(table, MACHINE, *FAILS)
    assert error.message == "'vm' did not start: QEMU exited with code 3: broken"
    (process,) = table.list()
    assert (process.exit_code, process.signal, process.stderr_tail) == (3, None, "broken")
    assert read_record(directory.instance(MACHINE.uid).process) == process
    assert await table.start(MACHINE, never) == process  # the same start, so the same process


async def test_an_error_holds_no_more_than_fits_into_a_header(table: ProcessTable) -> None:
    error = await fails(table, MACHINE, sys.executable, "-c", "import sys; sys.exit('\u00fc' * 3000)")
    assert len(error.message) < 600
    assert len(table.list()[0].stderr_tail) > 2000


async def test_a_program_that_cannot_be_executed_leaves_nothing(table: ProcessTable, directory: RunDirectory) -> None:
    error = await fails(table, MACHINE, "/nonexistent/qemu")
    assert "/nonexistent/qemu" in error.message
    assert table.list() == ()
    assert os.listdir(directory.instances) == []


async def test_a_run_directory_that_cannot_be_written_fails_the_start(
    table: ProcessTable, directory: RunDirectory
) -> None:
    directory.instance(MACHINE.uid).path.touch()
    error = await fails(table, MACHINE, *FAILS)
    assert "File exists" in error.message or "Not a directory" in error.message
    assert table.list() == ()


async def test_a_link_in_place_of_the_run_directory_is_not_followed(
    table: ProcessTable, directory: RunDirectory
) -> None:
    elsewhere = directory.path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "qmp.sock").touch()
    directory.instance(MACHINE.uid).path.symlink_to(elsewhere)
    await fails(table, MACHINE, *FAILS)
    with pytest.raises(FailedPrecondition):
        await table.release(MACHINE.uid)
    assert os.listdir(elsewhere) == ["qmp.sock"]


async def test_a_caller_who_gives_up_does_not_end_the_start(table: ProcessTable) -> None:
    await sitting(table, MACHINE)
    (process,) = table.list()
    assert not process.ended
    assert await table.start(MACHINE, never) == process


async def test_a_stop_ends_a_start_that_waits_for_qemu(table: ProcessTable) -> None:
    watch = table.watch()
    assert await anext(watch) is None
    start = asyncio.create_task(table.start(MACHINE, plan(*SITS)))
    async with asyncio.timeout(5):
        await anext(watch)
        stopped = await table.stop(MACHINE.uid, 1, grace_s=1)
        assert stopped.signal == signal.SIGTERM
        with pytest.raises(FailedPrecondition, match="was ended by signal 15"):
            await start
    await watch.aclose()


async def test_an_end_is_told_even_if_it_cannot_be_recorded(table: ProcessTable, directory: RunDirectory) -> None:
    await sitting(table, MACHINE)
    run = directory.instance(MACHINE.uid)
    run.path.rename(directory.path / "gone")
    stopped = await table.stop(MACHINE.uid, 1, grace_s=0)
    assert stopped.ended
    assert table.list() == (stopped,)


async def test_a_start_without_a_process_is_forgotten_even_beside_a_foreign_file(
    table: ProcessTable, directory: RunDirectory
) -> None:
    await fails(table, MACHINE, *FAILS)
    run = directory.instance(MACHINE.uid)
    (process,) = table.list()
    write_record(run.process, replace(process, pid=None, start_ticks=None, ended_at_s=None, exit_code=None))
    (run.path / "foreign").touch()
    later = ProcessTable(directory)
    later.adopt()
    assert later.list() == ()
    assert os.listdir(run.path) == ["foreign"]
