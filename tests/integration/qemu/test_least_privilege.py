"""What QEMU and the helper may do, as the kernel has it, and what one machine's QEMU can do to another's files."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.qemu import house as houses
from tests.integration.qemu.house import House
from vmherd.api.settings.v1.settings_pb2 import Network, UidRange
from vmherd.qemu.capabilities import CAPABILITIES

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="only root has users to give")]

CONTROLLER = 64999
FIRST = 1899980000
MACHINES = range(FIRST + 2, FIRST + 5)

IN_PLACE_OF_QEMU = """#!/bin/sh
case "$1" in --version) echo 'QEMU emulator version 99.1 (Test)'; exit;; -machine) exit;; esac
exec 2>&1
id
for path in {paths}; do
    if cat "$path" >/dev/null 2>&1; then echo "read $path"; fi
    if (: >>"$path") 2>/dev/null; then echo "wrote $path"; fi
done
kill -0 {pid} 2>/dev/null && echo "may signal {pid}"
echo done
"""


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """A house whose controller is another user than the helper."""
    async with houses.house() as it:
        await it.close(signal.SIGTERM)
        it.settings.controller_user = str(CONTROLLER)
        it.settings.uids.CopyFrom(UidRange(first=FIRST, count=5))
        os.chmod(it.state.path, 0o700)
        shutil.rmtree(it.run.path)
        await it.open()
        yield it


def status(pid: int, task: str = "") -> dict[str, list[str]]:
    text = Path(f"/proc/{pid}/{task}/status").read_text()
    return {key: value.split() for key, _, value in (line.partition(":") for line in text.splitlines())}


def owner(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


async def test_qemu_is_a_user_of_its_own_without_any_right(house: House) -> None:
    process = await house.up(house.machine())
    assert process.unix_uid == MACHINES[0]
    is_ = status(process.pid)
    assert is_["Uid"] == is_["Gid"] == [str(MACHINES[0])] * 4
    assert is_["Groups"] == []
    assert {is_[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert is_["NoNewPrivs"] == ["1"]
    assert is_["Seccomp"] == ["2"]
    with open(f"/proc/{process.pid}/limits") as limits:  # noqa: ASYNC230 - it is no file
        said = {" ".join(line.split()) for line in limits}
    assert said >= {
        "Max core file size 0 0 bytes",
        "Max processes 257 257 processes",
        "Max open files 4096 4096 files",
    }


async def test_the_helper_keeps_the_capabilities_of_the_table_and_no_others(house: House) -> None:
    assert house.helper is not None
    kept = f"{sum(1 << capability for capability in CAPABILITIES):016x}"
    for thread in os.listdir(f"/proc/{house.helper.pid}/task"):
        is_ = status(house.helper.pid, f"task/{thread}")
        assert [is_[name][0] for name in ("CapPrm", "CapEff", "CapBnd")] == [kept] * 3
        assert [is_[name][0] for name in ("CapInh", "CapAmb")] == ["0" * 16] * 2


async def test_everything_has_its_owner_and_mode(house: House) -> None:
    machine = house.machine()
    process = await house.up(machine)
    run, state = house.instance(machine.uid), house.state.instance(machine.uid)
    assert owner(house.run.path) == owner(house.run.instances) == owner(run.path) == (0, CONTROLLER, 0o750)
    assert {owner(path) for path in run.sockets} == {(0, CONTROLLER, 0o660)}
    assert {owner(path)[::2] for path in (run.process, run.stderr)} == {(0, 0o600)}
    assert owner(house.listen) == (0, CONTROLLER, 0o660)
    assert owner(state.path) == (process.unix_uid, CONTROLLER, 0o770)
    assert owner(state.disk) == owner(state.console_log) == (process.unix_uid, CONTROLLER, 0o660)
    assert sorted(os.listdir(run.path)) == ["agent.sock", "console.sock", "process.json", "qmp.sock", "stderr.log"]


async def test_a_user_is_free_again_once_the_machine_s_files_are_gone(house: House) -> None:
    first, second = house.machine(), house.machine()
    assert [(await house.start(machine)).unix_uid for machine in (first, second)] == list(MACHINES[:2])
    await house.stop(first)
    await house.release(first.uid)
    assert (await house.start(house.machine())).unix_uid == MACHINES[2]  # the first one's disk is still there
    shutil.rmtree(house.state.instance(first.uid).path)
    assert (await house.start(house.machine())).unix_uid == MACHINES[0]
    with pytest.raises(Exception, match="all 3 users for machines are taken"):
        await house.start(house.machine())


@pytest.mark.parametrize("running", [True, False], ids=["running", "ended"])
async def test_a_machine_has_its_user_under_the_next_helper_too(house: House, running: bool) -> None:
    other, machine = house.machine(), house.machine()
    await house.start(other)
    process = await house.up(machine)
    if not running:
        await house.stop(machine)
    await house.restart()
    assert {known.uid: known.unix_uid for known in await house.processes()} == {
        other.uid: MACHINES[0],
        machine.uid: MACHINES[1],
    }
    await house.stop(machine)
    again = await house.start(house.machine(uid=machine.uid, generation=2))
    assert (again.unix_uid, again.pid == process.pid) == (MACHINES[1], False)


async def test_a_start_that_is_still_between_two_programs_is_adopted(house: House) -> None:
    """As after a helper that was killed right after a start: the process is root's yet, and begins with other words."""
    machine = house.machine()
    process = await house.start(machine)
    await house.close(signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    await house.end_of(process.pid)
    run = house.instance(machine.uid)
    record = json.loads(run.process.read_text())
    held = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", "echo; read line", "sh", *record["argv"]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert held.stdout is not None
    await held.stdout.readline()
    house.change_record(machine.uid, pid=None, start_ticks=None)
    try:
        await house.open()
        (found,) = await house.processes()
        assert (found.pid, found.HasField("end_time")) == (held.pid, False)
        stopping = asyncio.create_task(house.stop(machine))
        assert await held.wait() == -signal.SIGKILL
        await stopping
    finally:
        if held.returncode is None:
            held.kill()
            await held.wait()


async def test_one_machine_s_qemu_gets_at_nothing_of_another_s(house: House) -> None:
    victim = house.machine()
    process = await house.up(victim)
    run, state = house.instance(victim.uid), house.state.instance(victim.uid)
    spied = house.machine()
    paths = [
        *(state.disk, state.console_log, state.path, *run.sockets, run.process, run.stderr, run.path),
        *(house.listen, house.run.instances, house.state.instance(spied.uid).path / "new"),
        *(Path(f"/proc/{process.pid}/{name}") for name in ("mem", "environ", "fd/0")),
        "/etc/passwd",
    ]
    await house.close(signal.SIGTERM)
    program = house.path / "qemu"
    program.write_text(IN_PLACE_OF_QEMU.format(paths=" ".join(map(str, paths)), pid=process.pid))
    program.chmod(0o755)
    house.settings.qemu_binary = str(program)
    await house.open()
    await house.start(spied)
    ended = await house.end(spied)
    program.unlink()
    identity, *said = ended.stderr_tail.splitlines()
    assert identity == f"uid={MACHINES[1]} gid={MACHINES[1]} groups={MACHINES[1]}"
    assert said == ["read /etc/passwd", "done"]  # all that it could


async def test_a_run_directory_that_others_may_write_to_is_refused(house: House) -> None:
    await house.close(signal.SIGTERM)
    for path, change in (
        (house.run.path, lambda path: os.chmod(path, 0o770)),
        (house.run.path, lambda path: os.chown(path, CONTROLLER, -1)),
        (house.run.instances, lambda path: os.chmod(path, 0o757)),
        (house.path, lambda path: os.chmod(path, 0o775)),
    ):
        before = path.stat()
        change(path)
        code, stderr = await house.second_helper()
        assert code != 0
        assert f"others own {path} or may write to it" in stderr
        os.chown(path, before.st_uid, before.st_gid)
        os.chmod(path, stat.S_IMODE(before.st_mode))
    await house.open()


async def test_a_socket_in_a_directory_of_the_controller_is_refused(house: House) -> None:
    """It could exchange the socket for a link while root gives it to a group."""
    directory = house.path / "state" / "sockets"
    directory.mkdir()
    os.chown(directory, CONTROLLER, -1)
    await house.close(signal.SIGTERM)
    for listen in (directory / "q.sock", directory / "deeper" / "q.sock"):
        code, stderr = await house.second_helper(listen=str(listen))
        assert code != 0
        assert f"listen: cannot use {directory}: others own {directory}" in stderr
    assert os.listdir(directory) == []
    await house.open()


async def test_a_directory_that_a_killed_helper_has_just_made_is_given_to_the_controller(house: House) -> None:
    await house.close(signal.SIGKILL)
    expected = house.run.instances.stat()
    os.chown(house.run.instances, -1, 0)
    house.run.instances.chmod(0o700)
    await house.open()
    status = house.run.instances.stat()
    assert (status.st_mode, status.st_gid) == (expected.st_mode, expected.st_gid)


async def test_what_is_refused_is_logged_with_the_reason(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    machine = house.machine()
    machine.disks[0].path = "/etc/shadow"
    await house.restart()  # so that what it says comes here
    for call in (house.start(machine), house.stop(machine), house.release("../.."), house.stop(machine, grace_s=-1)):
        with pytest.raises(Exception, match=r"does not lie in|no process of|uid: |grace: "):
            await call
    said = capfd.readouterr().out
    for reason in ("PATH_REFUSED", "PROCESS_NOT_FOUND", "INVALID_ARGUMENT"):
        assert f"reason={reason}" in said
    assert "call=Release" in said


async def test_networks_are_named_that_cannot_be(house: House) -> None:
    await house.close(signal.SIGTERM)
    house.settings.networks.append(Network(name="office", bridge="a bridge", subnet="10.0.0.0/33"))
    code, stderr = await house.second_helper()
    assert code != 0
    assert "networks[0].subnet" in stderr
    del house.settings.networks[:]
    await house.open()
