"""The typed commands against the real qemu-ga on this host: what it answers is what Python says of the host."""

from __future__ import annotations

import asyncio
import os
import platform
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message_factory import GetMessageClass

from tests.contract.guest_agent.conftest import TIMEOUT_S, QemuGa
from vmherd.api.v1 import guest_pb2 as pb
from vmherd.controller.agent_json import arguments_of, fill
from vmherd.controller.guest import COMMANDS, SERVICE
from vmherd.guest_agent import CommandDisabled, CommandFailed, CommandNotFound, CommandUnavailable, GuestAgent
from vmherd.guest_agent.wire import MAX_FILE_READ_BYTES

pytestmark = pytest.mark.anyio

HARMFUL = {
    "Shutdown",
    "SetTime",
    "FsfreezeFreeze",
    "FsfreezeFreezeList",
    "FsfreezeThaw",
    "Fstrim",
    "SuspendDisk",
    "SuspendRam",
    "SuspendHybrid",
    "SetUserPassword",
    "SshAddAuthorizedKeys",
    "SshRemoveAuthorizedKeys",
}
"""What must not run on the machine of whoever runs the tests."""
HARMLESS = {command for rpc, command in COMMANDS.items() if rpc not in HARMFUL}

CPUS = Path("/sys/devices/system/cpu")
MEMORY = Path("/sys/devices/system/memory")

Ask = Callable[..., Awaitable[Any]]


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def words(path: str) -> list[list[str]]:
    return [line.split() for line in Path(path).read_text().splitlines()]


def block_devices() -> dict[str, Path]:
    return {path.name: path for path in Path("/sys/class/block").iterdir()}


def numbered(folder: Path, name: str) -> dict[int, Path]:
    """The folders `name0`, `name1` and so on by their number."""
    return {int(path.name.removeprefix(name)): path for path in folder.glob(f"{name}[0-9]*")}


@pytest.fixture
async def agent() -> AsyncIterator[GuestAgent]:
    # Socket paths hold 107 bytes, so this is not pytest's own directory.
    with tempfile.TemporaryDirectory(prefix="vmherd-") as folder:
        qemu_ga = QemuGa(Path(folder) / "agent.sock", harmless=HARMLESS)
        await qemu_ga.start()
        try:
            async with GuestAgent(qemu_ga.path) as agent:
                yield agent
        finally:
            await qemu_ga.stop()


@pytest.fixture
def ask(agent: GuestAgent) -> Ask:
    """Calls an RPC's command with fields for its request, and gives its response."""

    async def ask(rpc: str, **fields: Any) -> Any:
        method = SERVICE.methods_by_name[rpc]
        request = GetMessageClass(method.input_type)(**fields)
        response = GetMessageClass(method.output_type)()
        fill(response, await agent.execute(COMMANDS[rpc], arguments_of(request), timeout_s=TIMEOUT_S))
        return response

    return ask


@pytest.fixture
async def version(ask: Ask) -> tuple[int, int]:
    """The agent's: its newer commands are tested where they are."""
    major, minor, *_ = (await ask("Info")).version.split(".")
    return int(major), int(minor)


@pytest.mark.parametrize("rpc", ["Sync", "SyncDelimited"])
@pytest.mark.parametrize("number", [0, -(2**63), 2**63 - 1, 2**53 + 1])
async def test_sync_gives_the_number_back(ask: Ask, rpc: str, number: int) -> None:
    assert (await ask(rpc, id=number)).id == number


async def test_ping_has_nothing_to_say(ask: Ask) -> None:
    assert await ask("Ping") == pb.GuestPingResponse()


async def test_info_tells_version_and_commands(ask: Ask) -> None:
    info = await ask("Info")
    program = shutil.which("qemu-ga", path="/usr/sbin:/usr/bin:/usr/local/bin")
    assert program
    assert info.version in run(program, "--version")
    assert {command.name for command in info.supported_commands} == set(run(program, "-b", "help").split())
    by_name = {command.name: command for command in info.supported_commands}
    assert by_name["guest-ping"] == pb.GuestAgentCommandInfo(name="guest-ping", enabled=True, success_response=True)
    assert not by_name["guest-set-time"].enabled
    silent = {command.name for command in info.supported_commands if not command.success_response}
    assert silent == {"guest-shutdown", "guest-suspend-disk", "guest-suspend-ram", "guest-suspend-hybrid"}


@pytest.mark.parametrize("rpc", sorted(HARMFUL))
async def test_a_disabled_command_says_so(agent: GuestAgent, rpc: str) -> None:
    with pytest.raises(CommandDisabled, match=COMMANDS[rpc]):
        await agent.execute(COMMANDS[rpc], timeout_s=TIMEOUT_S)


async def test_time_is_this_host_s(ask: Ask) -> None:
    before_us = time.time_ns() // 1000
    time_ns = (await ask("GetTime")).time
    assert before_us <= time_ns // 1000 <= time.time_ns() // 1000


async def test_a_file_is_written_read_and_sought(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "ä file"
    content = bytes(range(256)) * 40
    handle = (await ask("FileOpen", path=str(path), mode="w+")).handle
    wrote = await ask("FileWrite", handle=handle, buf_b64=content)
    assert (wrote.count, wrote.eof) == (len(content), False)
    assert path.read_bytes() != content  # it is still with the agent
    assert await ask("FileFlush", handle=handle) == pb.GuestFileFlushResponse()
    assert path.read_bytes() == content

    assert (await ask("FileSeek", handle=handle, offset=0, whence_name="CUR")).position == len(content)
    assert (await ask("FileSeek", handle=handle, offset=-6, whence_name="END")).position == len(content) - 6
    assert (await ask("FileSeek", handle=handle, offset=0, whence_name="SET")).position == 0
    assert (await ask("FileSeek", handle=handle, offset=10, whence_value=0)).position == 10
    assert (await ask("FileSeek", handle=handle, offset=-1, whence_value=1)).position == 9
    read = await ask("FileRead", handle=handle, count=5)
    assert (read.count, read.buf_b64, read.eof) == (5, content[9:14], False)
    read = await ask("FileRead", handle=handle)
    assert (read.count, read.buf_b64, read.eof) == (4096, content[14 : 14 + 4096], False)
    read = await ask("FileRead", handle=handle, count=len(content))
    assert (read.count, read.buf_b64, read.eof) == (len(content) - 14 - 4096, content[14 + 4096 :], True)
    assert (await ask("FileSeek", handle=handle, offset=0, whence_name="CUR")).eof is False
    read = await ask("FileRead", handle=handle, count=0)
    assert (read.count, read.buf_b64) == (0, b"")
    assert await ask("FileClose", handle=handle) == pb.GuestFileCloseResponse()
    with pytest.raises(CommandFailed, match=f"handle '{handle}' has not been found"):
        await ask("FileClose", handle=handle)


async def test_files_are_opened_as_asked(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("first")
    handle = (await ask("FileOpen", path=str(path))).handle
    with pytest.raises(CommandFailed, match="failed to write to file"):
        await ask("FileWrite", handle=handle, buf_b64=b"x" * 5000)
    await ask("FileClose", handle=handle)
    handle = (await ask("FileOpen", path=str(path), mode="a")).handle
    assert (await ask("FileWrite", handle=handle, buf_b64=b" second", count=4)).count == 4
    await ask("FileClose", handle=handle)
    assert path.read_text() == "first sec"
    with pytest.raises(CommandFailed, match="No such file"):
        await ask("FileOpen", path=str(tmp_path / "missing"))
    with pytest.raises(CommandFailed, match="mode"):
        await ask("FileOpen", path=str(path), mode="sideways")


async def test_the_largest_read(ask: Ask, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 32
    (tmp_path / "large").write_bytes(content + b"more")
    handle = (await ask("FileOpen", path=str(tmp_path / "large"))).handle
    read = await ask("FileRead", handle=handle, count=MAX_FILE_READ_BYTES)
    assert (read.count, read.buf_b64 == content, read.eof) == (32 << 20, True, False)
    assert (await ask("FileRead", handle=handle, count=5)).buf_b64 == b"more"


async def test_devices_are_known_on_windows_alone(ask: Ask) -> None:
    with pytest.raises(CommandUnavailable, match="guest-get-devices"):
        await ask("GetDevices")


async def test_load_is_this_host_s_since_10_0(ask: Ask, version: tuple[int, int]) -> None:
    if version < (10, 0):
        with pytest.raises(CommandNotFound, match="guest-get-load"):
            await ask("GetLoad")
    else:
        load = await ask("GetLoad")
        assert (load.load1m, load.load5m, load.load15m) == pytest.approx(os.getloadavg(), abs=1)


async def test_routes_are_this_host_s_since_9_1(ask: Ask, version: tuple[int, int]) -> None:
    if version < (9, 1):
        with pytest.raises(CommandNotFound, match="guest-network-get-route"):
            await ask("NetworkGetRoute")
    else:
        routes = (await ask("NetworkGetRoute")).routes
        _, *real = words("/proc/net/route")
        assert [route.iface for route in routes if route.version == 4] == [iface for iface, *_ in real]


async def test_nothing_is_frozen(ask: Ask) -> None:
    assert (await ask("FsfreezeStatus")).status == pb.GuestFsfreezeStatusResponse.THAWED


async def test_network_interfaces_are_this_host_s(ask: Ask) -> None:
    interfaces = {it.name: it for it in (await ask("NetworkGetInterfaces")).interfaces}
    assert set(interfaces) == {name for _, name in socket.if_nameindex()}
    for name, interface in interfaces.items():
        folder = Path("/sys/class/net") / name
        assert interface.hardware_address == (folder / "address").read_text().strip()
        if interface.HasField("statistics"):
            assert interface.statistics.rx_bytes <= int((folder / "statistics/rx_bytes").read_text())
    loopback = interfaces["lo"].ip_addresses[0]
    assert (loopback.ip_address, loopback.ip_address_type, loopback.prefix) == ("127.0.0.1", pb.GuestIpAddress.IPV4, 8)


async def test_processors_are_this_host_s(ask: Ask) -> None:
    seen = {it.logical_id: it for it in (await ask("GetVcpus")).vcpus}
    real = numbered(CPUS, "cpu")
    assert set(seen) == set(real)
    for number, vcpu in seen.items():
        switch = real[number] / "online"
        assert vcpu.can_offline == switch.exists()
        assert vcpu.online == (not switch.exists() or switch.read_text().strip() == "1")


async def test_processors_that_do_not_exist_cannot_be_changed(ask: Ask) -> None:
    assert (await ask("SetVcpus")).processed == 0
    with pytest.raises(CommandFailed, match="cpu99999"):
        await ask("SetVcpus", vcpus=[{"logical_id": 99999, "online": False}])


@pytest.mark.skipif(not MEMORY.exists(), reason="the kernel does not tell memory blocks")
async def test_memory_blocks_are_this_host_s(ask: Ask) -> None:
    assert (await ask("GetMemoryBlockInfo")).size == int((MEMORY / "block_size_bytes").read_text(), 16)
    seen = {it.phys_index: it for it in (await ask("GetMemoryBlocks")).mem_blks}
    real = numbered(MEMORY, "memory")
    assert set(seen) == set(real)
    for number, block in seen.items():
        assert block.online == ((real[number] / "state").read_text().strip() == "online")
    assert list((await ask("SetMemoryBlocks")).responses) == []
    [missing] = (await ask("SetMemoryBlocks", mem_blks=[{"phys_index": 2**40, "online": True}])).responses
    assert (missing.phys_index, missing.response) == (2**40, pb.GuestMemoryBlockResponse.NOT_FOUND)


async def test_disks_are_this_host_s(ask: Ask) -> None:
    disks = {it.name: it for it in (await ask("GetDisks")).disks}
    real = {f"/dev/{name}": path for name, path in block_devices().items() if int((path / "size").read_text())}
    assert set(disks) == set(real)
    for name, disk in disks.items():
        assert disk.partition == (real[name] / "partition").exists()
        if disk.partition:
            assert f"/dev/{real[name].resolve().parent.name}" in disk.dependencies
        elif disk.HasField("address"):
            assert disk.address.dev == name


async def test_file_systems_are_this_host_s(ask: Ask) -> None:
    mounts = words("/proc/self/mounts")
    types = {(re.sub(r"\\040", " ", mountpoint), kind) for _, mountpoint, kind, *_ in mounts}
    filesystems = (await ask("GetFsinfo")).filesystems
    for filesystem in filesystems:
        assert (filesystem.mountpoint, filesystem.type) in types
        real = os.statvfs(filesystem.mountpoint)
        used = (real.f_blocks - real.f_bfree) * real.f_frsize
        assert filesystem.used_bytes == pytest.approx(used, rel=0.05)
        assert filesystem.total_bytes == pytest.approx(used + real.f_bavail * real.f_frsize, rel=0.05)
    on_disks = [device for device, *_ in mounts if device.removeprefix("/dev/") in block_devices()]
    assert bool(filesystems) == bool(on_disks)


async def _finished(ask: Ask, pid: int) -> Any:
    async with asyncio.timeout(TIMEOUT_S):
        while not (status := await ask("ExecStatus", pid=pid)).exited:
            assert not status.HasField("exitcode")
            await asyncio.sleep(0.01)
    return status


async def test_a_program_runs_with_what_it_is_given(ask: Ask) -> None:
    pid = (
        await ask(
            "Exec",
            path="/bin/sh",
            arg=["-c", 'cat; printf %s "$A" "$PATH" >&2; exit 3'],
            env=["A=ä b", "PATH=/usr/bin:/bin"],
            input_data=b"\0\xff\n",
            capture_output_flag=True,
        )
    ).pid
    assert await _finished(ask, pid) == pb.GuestExecStatusResponse(
        exited=True,
        exitcode=3,
        out_data=b"\0\xff\n",
        err_data="ä b/usr/bin:/bin".encode(),
        out_truncated=False,
        err_truncated=False,
    )
    with pytest.raises(CommandFailed, match="pid"):
        await ask("ExecStatus", pid=pid)


async def test_a_program_that_a_signal_ends(ask: Ask) -> None:
    pid = (await ask("Exec", path="sh", arg=["-c", "kill -9 $$"])).pid
    assert await _finished(ask, pid) == pb.GuestExecStatusResponse(exited=True, signal=signal.SIGKILL)


@pytest.mark.parametrize("fields", [{}, {"capture_output_flag": False}])
async def test_output_is_kept_only_where_it_is_wanted(ask: Ask, fields: dict[str, Any]) -> None:
    pid = (await ask("Exec", path="echo", arg=["hello"], **fields)).pid
    assert await _finished(ask, pid) == pb.GuestExecStatusResponse(exited=True, exitcode=0)


async def test_output_beyond_16_mib_is_cut(ask: Ask) -> None:
    pid = (await ask("Exec", path="head", arg=["-c", str(17 << 20), "/dev/zero"], capture_output_flag=True)).pid
    status = await _finished(ask, pid)
    assert (len(status.out_data), status.out_truncated, status.HasField("err_truncated")) == (16 << 20, True, False)


async def test_output_streams_can_be_merged_since_8_0(ask: Ask, version: tuple[int, int]) -> None:
    program: dict[str, Any] = {"path": "sh", "arg": ["-c", "echo out; echo err >&2"], "capture_output_mode": "MERGED"}
    if version < (8, 0):
        with pytest.raises(CommandFailed, match="capture-output"):
            await ask("Exec", **program)
    else:
        assert (await _finished(ask, (await ask("Exec", **program)).pid)).out_data == b"out\nerr\n"


async def test_a_program_that_does_not_exist(ask: Ask) -> None:
    with pytest.raises(CommandFailed, match="No such file"):
        await ask("Exec", path="/nonexistent")


async def test_host_name_is_this_host_s(ask: Ask) -> None:
    assert (await ask("GetHostName")).host_name == socket.gethostname()


async def test_users_are_those_logged_in(ask: Ask) -> None:
    before_s = time.time()
    users = (await ask("GetUsers")).users
    assert {user.user for user in users} == {line.split()[0] for line in run("who").splitlines()}
    assert all(0 < user.login_time <= before_s for user in users)


async def test_time_zone_is_this_host_s(ask: Ask) -> None:
    zone = await ask("GetTimezone")
    here = datetime.now().astimezone()
    offset = here.utcoffset()
    assert offset is not None
    assert (zone.zone, zone.offset) == (here.tzname(), offset.total_seconds())


async def test_operating_system_is_this_host_s(ask: Ask) -> None:
    system = await ask("GetOsinfo")
    kernel, release = os.uname(), platform.freedesktop_os_release()
    assert (system.kernel_release, system.kernel_version, system.machine) == (
        kernel.release,
        kernel.version,
        kernel.machine,
    )
    assert (system.id, system.name, system.pretty_name) == (release["ID"], release["NAME"], release["PRETTY_NAME"])
    assert (system.version_id, system.version) == (release.get("VERSION_ID", ""), release.get("VERSION", ""))
    assert system.HasField("variant") == ("VARIANT" in release)


async def test_authorized_keys_are_read(ask: Ask) -> None:
    user = pwd.getpwuid(os.getuid())
    path = Path(user.pw_dir) / ".ssh/authorized_keys"
    if path.exists():
        lines = {line for line in path.read_text().splitlines() if line and not line.startswith("#")}
        assert set((await ask("SshGetAuthorizedKeys", username=user.pw_name)).keys) == lines
    else:
        with pytest.raises(CommandFailed, match="failed to read"):
            await ask("SshGetAuthorizedKeys", username=user.pw_name)
    with pytest.raises(CommandFailed, match="nosuchuser"):
        await ask("SshGetAuthorizedKeys", username="nosuchuser")


async def test_disk_statistics_are_this_host_s(ask: Ask) -> None:
    def counters() -> dict[tuple[str, int, int], list[int]]:
        return {
            (name, int(major), int(minor)): list(map(int, rest))
            for major, minor, name, *rest in words("/proc/diskstats")
        }

    before = counters()
    disks = {(it.name, it.major, it.minor): it.stats for it in (await ask("GetDiskstats")).disks}
    after = counters()
    assert set(disks) == set(before)
    for key, stats in disks.items():
        seen = [stats.read_ios, stats.read_merges, stats.read_sectors, stats.read_ticks]
        seen += [stats.write_ios, stats.write_merges, stats.write_sectors, stats.write_ticks]
        assert all(low <= value <= high for low, value, high in zip(before[key], seen, after[key], strict=False))


async def test_processor_statistics_are_this_host_s(ask: Ask) -> None:
    tick_ms = 1000 // os.sysconf("SC_CLK_TCK")

    def counters() -> dict[int, list[int]]:
        return {
            int(name.removeprefix("cpu")): [int(value) * tick_ms for value in values]
            for name, *values in words("/proc/stat")
            if re.fullmatch("cpu[0-9]+", name)
        }

    before = counters()
    cpus = {it.cpu: it for it in (await ask("GetCpustats")).cpus}
    after = counters()
    assert set(cpus) == set(before)
    for number, cpu in cpus.items():
        assert cpu.type == pb.GuestCpuStats.LINUX
        for index, value in enumerate([cpu.user, cpu.nice, cpu.system]):
            assert before[number][index] <= value <= after[number][index]
