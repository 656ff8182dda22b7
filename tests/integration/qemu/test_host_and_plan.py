"""What the helper tells of the host and of a machine that it does not start; and what keeps it from serving."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import grpc
import pytest

from tests.integration.qemu.house import DEADLINE_S, House
from vmherd.api.qemu.v1 import qemu_pb2
from vmherd.api.settings.v1.settings_pb2 import QemuSettings
from vmherd.model.errors import FailedPrecondition
from vmherd.rpc.status import from_rpc_error

pytestmark = pytest.mark.anyio

NEW = "#!/bin/sh\necho 'QEMU emulator version 99.1 (Test)'\n"
OLD = "#!/bin/sh\necho 'QEMU emulator version 6.2.0 (Test)'\n"


def memory_mib() -> int:
    return int(Path("/proc/meminfo").read_text().split()[1]) // 1024


def words_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def without_numbers(words: list[str]) -> list[str]:
    """The words without the numbers of descriptors, which differ."""
    return [re.sub(r"(fd=|fd/|fdset/|set=)[0-9]+", r"\1N", word) for word in words]


async def plan(house: House, machine: qemu_pb2.Machine) -> list[str]:
    return list((await house.stub.Plan(qemu_pb2.PlanRequest(machine=machine), timeout=DEADLINE_S)).argv)


async def host(house: House) -> qemu_pb2.HostResponse:
    return await house.stub.Host(qemu_pb2.HostRequest(), timeout=DEADLINE_S)


async def test_the_host_is_described(house: House) -> None:
    told = await host(house)
    assert told.qemu_version.split(".")[0].isdigit()
    assert {"q35", "pc"} <= set(told.machine_types)
    assert told.accelerator == "tcg"
    assert not told.accelerators  # the settings choose, and nobody has to measure
    assert told.cpus == os.cpu_count()
    assert told.memory_mib == memory_mib()


async def test_accelerators_are_measured_where_the_settings_leave_them_open(house: House) -> None:
    house.settings.accelerator = QemuSettings.AUTO
    await house.restart()
    told = await host(house)
    measured = {accelerator.name: accelerator for accelerator in told.accelerators}
    assert set(measured) == {"kvm", "tcg"}
    assert measured["tcg"].usable
    assert measured["tcg"].elapsed.ToTimedelta().total_seconds() > 0
    assert measured["kvm"].usable or measured["kvm"].detail
    assert told.accelerator in measured


async def test_a_plan_is_what_start_runs(house: House) -> None:
    machine = house.machine()
    planned = await plan(house, machine)
    assert await house.processes() == []
    assert list(house.run.instances.iterdir()) == []
    process = await house.up(machine)
    assert without_numbers(words_of(process.pid)) == without_numbers(planned)


async def test_a_plan_needs_no_files_but_every_check_of_values(house: House) -> None:
    machine = house.machine()
    house.state.instance(machine.uid).disk.unlink()
    assert "node-name=disk0-file" in " ".join(await plan(house, machine))
    for changed, text in (
        (house.machine(memory_mib=64 * 1024 * 1024), "MiB of this host"),
        (house.machine(kernel_boot={"kernel": "/etc/passwd"}), "does not lie in"),
        (house.machine(uid=machine.uid, name="Not a name"), "name: must start with a lower-case letter"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=text):
            await plan(house, changed)


@pytest.mark.parametrize(
    ("script", "reason", "text"),
    [
        (None, "QEMU_MISSING", "qemu-system-x86"),
        ("#!/bin/sh\necho hello\n", "QEMU_MISSING", "does not say that it is QEMU"),
        ("#!/bin/sh\nexit 3\n", "QEMU_MISSING", "exit status 3"),
        (OLD, "QEMU_TOO_OLD", "7.0 or newer"),
    ],
)
async def test_without_a_qemu_the_helper_serves_and_notices_when_there_is_one(
    house: House, script: str | None, reason: str, text: str
) -> None:
    await house.close(signal.SIGTERM)
    program = house.state.path / "qemu"
    house.settings.qemu_binary = str(program)
    if script is not None:
        program.write_text(script)
        program.chmod(0o755)
    await house.open()
    machine = house.machine()
    for attempt in (host(house), plan(house, machine), house.start(machine)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        error = from_rpc_error(refused.value)
        assert isinstance(error, FailedPrecondition)
        assert error.reason == reason
        assert text in error.message
    assert await house.processes() == []

    installed = program.with_suffix(".new")
    installed.write_text(NEW)
    installed.chmod(0o755)
    installed.replace(program)
    assert (await plan(house, machine))[0] == str(program)


async def test_settings_that_cannot_be_served(house: House) -> None:
    file = house.path / "state" / "file"
    file.touch()
    long = str(house.path / ("x" * 60))
    good = {
        "listen": str(house.path / "2.sock"),
        "run_dir": str(house.path / "state" / "run"),
        "state_dir": str(house.state.path),
    }
    cases = [
        ({"listen": ""}, "listen: must be an absolute path"),
        ({"run_dir": "run"}, "run_dir: must be an absolute path"),
        ({"state_dir": "/a/../b"}, "state_dir: must be an absolute path"),
        ({"state_dir": str(house.path / "none")}, "state_dir: cannot use"),
        ({"run_dir": str(file)}, "run_dir: cannot use"),
        ({"run_dir": long}, "choose a shorter run directory"),
        ({"listen": f"{long}/{'x' * 60}"}, "choose a shorter run directory"),
    ]
    for changes, text in cases:
        code, stderr = await house.second_helper(**(good | changes))
        assert code != 0
        assert text in stderr
