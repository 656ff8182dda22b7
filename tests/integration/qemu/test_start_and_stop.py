"""Real QEMUs, started and ended through the helper's socket."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import grpc
import pytest

from tests.integration.qemu.house import DEADLINE_S, House
from vmherd.api.qemu.v1 import qemu_pb2
from vmherd.model.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from vmherd.rpc.status import from_rpc_error

pytestmark = pytest.mark.anyio


def status_field(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


async def test_a_machine_runs_confined_and_on_its_own_until_it_is_stopped(house: House) -> None:
    machine = house.machine()
    async with house.watching() as news:
        process = await house.up(machine)
        assert await anext(news) == process
        assert (process.uid, process.name, process.generation) == (machine.uid, "idle", 1)
        assert abs(process.start_time.seconds - time.time()) < 60
        assert not process.HasField("end_time")
        assert house.qemu_pids() == [process.pid]

        assert status_field(process.pid, "Seccomp") == "2"
        assert status_field(process.pid, "NoNewPrivs") == "1"
        assert os.getsid(process.pid) == process.pid
        assert os.readlink(f"/proc/{process.pid}/fd/0") == "/dev/null"
        assert house.instance(machine.uid).path.stat().st_mode & 0o777 == 0o700  # the controller is the same user
        for socket in ("qmp", "agent", "console"):
            assert getattr(house.instance(machine.uid), socket).is_socket()

        stopped = await house.stop(machine, grace_s=10)
        assert stopped.exit_code == 0
        assert not stopped.HasField("signal")
        assert "terminating on signal 15" in stopped.stderr_tail
        assert await anext(news) == stopped
    assert await house.processes() == [stopped]
    assert await house.stop(machine) == stopped  # again: the same answer

    await house.release(machine.uid)
    assert await house.processes() == []
    assert not house.instance(machine.uid).path.exists()
    await house.release(machine.uid)  # again: nothing to do


async def test_the_control_socket_is_the_caller_s_from_the_first_moment(house: House) -> None:
    machine = house.machine()
    async with asyncio.TaskGroup() as group:
        start = group.create_task(house.start(machine))
        async with house.qmp(machine.uid) as execute, asyncio.timeout(60):
            await start  # with the one place for a client taken
            assert b'"running": true' in await execute("query-status")


async def test_the_same_start_is_done_once(house: House) -> None:
    machine = house.machine()
    processes = await asyncio.gather(*(house.start(machine) for _ in range(5)))
    assert all(process == processes[0] for process in processes)
    assert await house.up(machine) == processes[0]
    assert house.qemu_pids() == [processes[0].pid]
    stopped = await house.stop(machine)
    assert await house.start(machine) == stopped  # this start has been; it takes a new generation to start again
    assert house.qemu_pids() == []


async def test_starts_that_are_given_up_and_made_again_are_done_once(house: House) -> None:
    machines = [house.machine() for _ in range(4)]
    starts = [asyncio.create_task(house.start(machine)) for machine in machines]
    await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
    for start in starts:
        start.cancel()
    await asyncio.gather(*starts, return_exceptions=True)
    processes = [await house.up(machine) for machine in machines]
    assert {process.pid for process in await house.processes()} == {process.pid for process in processes}
    assert sorted(process.pid for process in processes) == sorted(house.qemu_pids())


async def test_another_generation_is_refused_while_one_runs_and_replaces_it_afterwards(house: House) -> None:
    second = house.machine(generation=2)
    running = await house.up(second)
    for generation in (1, 3):
        other = house.machine(uid=second.uid, generation=generation)
        for attempt in (house.start(other), house.stop(other)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await attempt
            error = from_rpc_error(refused.value)
            assert isinstance(error, FailedPrecondition)
            assert error.reason == "OTHER_GENERATION"
            assert f"generation {generation} " in error.message
            assert f"generation 2 runs as process {running.pid}" in error.message
    assert house.qemu_pids() == [running.pid]
    await house.stop(second)
    with pytest.raises(grpc.aio.AioRpcError, match="generation 2 has ended"):
        await house.start(house.machine(uid=second.uid, generation=1))
    third = await house.start(house.machine(uid=second.uid, generation=3))
    assert await house.processes() == [third]
    assert third.pid != running.pid


async def test_a_kill_is_seen_with_its_signal_by_every_watcher(house: House) -> None:
    machine = house.machine()
    process = await house.start(machine)
    async with house.watching() as one, house.watching() as other:
        os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            ended = await anext(one)
            assert await anext(other) == ended
    assert ended.signal == signal.SIGKILL
    assert not ended.HasField("exit_code")
    assert ended.HasField("end_time")


async def test_a_qemu_that_ignores_sigterm_is_killed_after_the_grace(house: House) -> None:
    machine = house.machine()
    process = await house.up(machine)
    os.kill(process.pid, signal.SIGSTOP)
    started_s = time.monotonic()
    assert (await house.stop(machine, grace_s=1)).signal == signal.SIGKILL
    assert time.monotonic() - started_s >= 1


async def test_no_grace_kills_at_once(house: House) -> None:
    machine = house.machine()
    await house.start(machine)
    assert (await house.stop(machine)).signal == signal.SIGKILL


async def test_a_kernel_that_is_none_ends_qemu_with_what_it_says(house: House) -> None:
    house.kernel.write_bytes(b"not a kernel")
    machine = house.machine()
    process = await house.start(machine)
    assert not process.HasField("end_time")
    ended = await house.end(machine)
    assert ended.pid == process.pid
    assert ended.exit_code == 1
    assert "kernel" in ended.stderr_tail
    assert await house.processes() == [ended]
    assert await house.start(machine) == ended
    house.kernel.write_bytes(b"")
    second = house.machine(uid=machine.uid, generation=2)
    await house.start(second)
    assert (await house.end(second)).exit_code == 1


async def test_a_disk_that_another_machine_holds_ends_qemu_with_what_it_says(house: House) -> None:
    machine = house.machine()
    machine.disks.append(machine.disks[0])
    await house.start(machine)
    ended = await house.end(machine)
    assert ended.exit_code == 1
    assert "lock" in ended.stderr_tail


async def test_a_program_that_cannot_be_executed_fails_the_start(house: House) -> None:
    await house.close(signal.SIGTERM)
    interpreter, program = house.state.path / "sh", house.state.path / "qemu"
    interpreter.symlink_to("/bin/sh")
    program.write_text(f"#!{interpreter}\necho 'QEMU emulator version 99.1 (Test)'\n")
    program.chmod(0o755)
    house.settings.qemu_binary = str(program)
    await house.open()
    machine = house.machine()
    await house.stub.Plan(qemu_pb2.PlanRequest(machine=machine), timeout=DEADLINE_S)  # now it is known as a QEMU
    interpreter.unlink()
    if os.geteuid() == 0:  # another program is executed first, and tells
        await house.start(machine)
        ended = await house.end(machine)
        assert ended.exit_code
        assert str(program) in ended.stderr_tail
        return
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.start(machine)
    error = from_rpc_error(refused.value)
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "QEMU_DID_NOT_START"
    assert error.metadata["name"] == "idle"
    assert str(program) in error.message
    assert await house.processes() == []
    assert list(house.run.instances.iterdir()) == []


async def test_a_running_process_cannot_be_released(house: House) -> None:
    machine = house.machine()
    process = await house.start(machine)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.release(machine.uid)
    assert from_rpc_error(refused.value).reason == "PROCESS_RUNS"
    assert await house.processes() == [process]


async def test_release_leaves_foreign_files_alone(house: House) -> None:
    machine = house.machine()
    await house.start(machine)
    await house.stop(machine)
    foreign = house.instance(machine.uid).path / "notes"
    foreign.write_text("mine")
    with pytest.raises(grpc.aio.AioRpcError, match="not empty"):
        await house.release(machine.uid)
    assert foreign.read_text() == "mine"
    foreign.unlink()
    await house.release(machine.uid)


@pytest.mark.parametrize("uid", ["", "../..", "../../state", "6B1F3B0E-5F0C-4B54-9D3C-0123456789AB"])
async def test_release_takes_no_path_for_a_uid(house: House, uid: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.release(uid)
    assert isinstance(from_rpc_error(refused.value), InvalidArgument)


async def test_stop_of_something_unknown(house: House) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.stop(house.machine())
    assert isinstance(from_rpc_error(refused.value), NotFound)


@pytest.mark.parametrize("grace_s", [-1, 3601, 2**40])
async def test_a_grace_has_bounds(house: House, grace_s: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.stop(house.machine(), grace_s)
    error = from_rpc_error(refused.value)
    assert isinstance(error, InvalidArgument)
    assert [violation.field for violation in error.violations] == ["grace"]


async def test_a_refused_machine_leaves_nothing_behind(house: House) -> None:
    stolen = house.machine()
    stolen.disks[0].path = str(house.state.instance(house.machine().uid).disk)
    linked = house.machine()
    disk = house.state.instance(linked.uid).disk
    disk.unlink()
    disk.symlink_to("/etc/passwd")
    missing = house.machine(kernel_boot={"kernel": str(house.state.images / "none")})
    big = house.machine(memory_mib=64 * 1024 * 1024)
    unspecified = house.machine()
    unspecified.disks[0].format = 0
    unspecified.nics[0].backend = 7
    for machine, kind, text in (
        (stolen, PermissionDenied, "disks[0].path"),
        (linked, PermissionDenied, "symbolic link"),
        (missing, FailedPrecondition, "does not exist"),
        (big, InvalidArgument, "MiB of this host"),
        (unspecified, InvalidArgument, "nics[0].backend"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await house.start(machine)
        error = from_rpc_error(refused.value)
        assert isinstance(error, kind), error
        assert text in error.message
    assert await house.processes() == []
    assert list(house.run.instances.iterdir()) == []
    assert house.qemu_pids() == []
