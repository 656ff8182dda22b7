"""A helper in a process of its own, on directories of its own, with a machine that boots in no time."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from google.protobuf import json_format

from tests.framework.idle_kernel import idle_kernel
from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.api.settings.v1.settings_pb2 import QemuSettings
from vmherd.model.layout import InstanceRun, RunDirectory, StateDirectory
from vmherd.rpc.channel import open_channel

DEADLINE_S = 20.0
POLL_S = 0.01
HELPER = """
import asyncio, sys
from google.protobuf import json_format
from vmherd.api.settings.v1.settings_pb2 import QemuSettings
from vmherd.qemu.app import run
asyncio.run(run(json_format.Parse(sys.argv[1], QemuSettings())))
"""


async def _helper(settings: QemuSettings, stderr: int | None = None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HELPER, json_format.MessageToJson(settings)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=stderr,
    )


@dataclass
class House:
    """The directories, the settings, and the helper while it runs."""

    path: Path
    settings: QemuSettings = field(init=False)
    helper: asyncio.subprocess.Process | None = None
    channel: grpc.aio.Channel | None = None

    def __post_init__(self) -> None:
        self.run = RunDirectory(self.path / "run")
        self.state = StateDirectory(self.path / "state")
        self.kernel = self.state.images / "idle" / "kernel"
        self.kernel.parent.mkdir(parents=True)
        self.kernel.write_bytes(idle_kernel())
        self.kernel.chmod(0o644)
        self.listen = self.path / "q.sock"
        self.settings = QemuSettings(
            listen=str(self.listen),
            run_dir=str(self.run.path),
            state_dir=str(self.state.path),
            accelerator=QemuSettings.TCG,
        )

    @property
    def stub(self) -> qemu_pb2_grpc.QemuServiceAsyncStub:
        assert self.channel is not None
        return qemu_pb2_grpc.QemuServiceStub(self.channel)

    async def open(self) -> None:
        """Starts the helper and waits until it serves."""
        self.helper = await _helper(self.settings)
        self.channel = open_channel(self.listen)
        await self.stub.List(qemu_pb2.ListRequest(), wait_for_ready=True, timeout=DEADLINE_S)

    async def close(self, number: signal.Signals) -> int:
        """Ends the calls to the helper, and it with a signal."""
        assert self.channel is not None
        await self.channel.close()
        return await self.helper_ends(number)

    async def helper_ends(self, number: signal.Signals) -> int:
        """Ends the helper with a signal, while calls to it may go on."""
        assert self.helper is not None
        self.helper.send_signal(number)
        async with asyncio.timeout(DEADLINE_S):
            return await self.helper.wait()

    async def restart(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends the helper and starts another one."""
        await self.close(number)
        await self.open()

    async def second_helper(self, **changes: str) -> tuple[int, str]:
        """Runs another helper with settings that it must refuse: its exit code and what it said."""
        settings = QemuSettings()
        settings.CopyFrom(self.settings)
        for name, value in changes.items():
            setattr(settings, name, value)
        second = await _helper(settings, stderr=asyncio.subprocess.PIPE)
        async with asyncio.timeout(DEADLINE_S):
            _, stderr = await second.communicate()
        assert second.returncode is not None
        return second.returncode, stderr.decode()

    def machine(self, **changes: object) -> qemu_pb2.Machine:
        """A machine of a new instance, with its directory and disk made."""
        uid = str(changes.pop("uid", "") or uuid.uuid4())
        disk = self.state.instance(uid).disk
        disk.parent.mkdir(parents=True, exist_ok=True)
        disk.write_bytes(bytes(1 << 20))
        for path in (disk.parent, disk) if self.settings.controller_user else ():
            if path.stat().st_uid == os.geteuid():  # so it is new, and the controller would have made it
                os.chown(path, int(self.settings.controller_user), -1)
        machine = qemu_pb2.Machine(
            uid=uid,
            name="idle",
            generation=1,
            cpus=1,
            memory_mib=32,
            kernel_boot=qemu_pb2.KernelBoot(kernel=str(self.kernel)),
            disks=[qemu_pb2.Disk(path=str(disk), format=qemu_pb2.Disk.RAW)],
            nics=[qemu_pb2.Nic(mac="52:54:00:00:00:01", backend=qemu_pb2.Nic.USER)],
        )
        machine.MergeFrom(qemu_pb2.Machine(**changes))  # type: ignore[arg-type]
        return machine

    async def start(self, machine: qemu_pb2.Machine) -> qemu_pb2.Process:
        return await self.stub.Start(qemu_pb2.StartRequest(machine=machine), timeout=DEADLINE_S)

    async def up(self, machine: qemu_pb2.Machine) -> qemu_pb2.Process:
        """Starts a machine and waits until QEMU executes commands: it has its signal handlers, disks and sandbox."""
        process = await self.start(machine)
        async with self.qmp(machine.uid):
            return process

    @asynccontextmanager
    async def qmp(self, uid: str) -> AsyncIterator[Callable[[str], Awaitable[bytes]]]:
        """QEMU's control socket once QEMU executes commands: takes a command's name and gives QEMU's answer."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with suppress(FileNotFoundError, ConnectionRefusedError):
                    reader, writer = await asyncio.open_unix_connection(self.instance(uid).qmp)
                    break
                await asyncio.sleep(POLL_S)

            async def execute(command: str) -> bytes:
                writer.write(json.dumps({"execute": command}).encode() + b"\n")
                return await reader.readline()

            try:
                assert (await reader.readline()).startswith(b'{"QMP"')
                assert b'"return"' in await execute("qmp_capabilities")
                yield execute
            finally:
                writer.close()
                await writer.wait_closed()

    async def end(self, machine: qemu_pb2.Machine) -> qemu_pb2.Process:
        """What a watch tells of the end of a machine's process, once it has ended."""
        call = self.stub.Watch(qemu_pb2.WatchRequest(), timeout=DEADLINE_S)
        try:
            async for response in call:
                process = response.process
                if process.uid == machine.uid and process.HasField("end_time"):
                    assert process.generation == machine.generation
                    return process
        finally:
            call.cancel()
        raise AssertionError("a watch has no end")

    async def stop(self, machine: qemu_pb2.Machine, grace_s: int = 0) -> qemu_pb2.Process:
        request = qemu_pb2.StopRequest(uid=machine.uid, generation=machine.generation)
        request.grace.FromSeconds(grace_s)
        return await self.stub.Stop(request, timeout=DEADLINE_S)

    async def release(self, uid: str) -> None:
        await self.stub.Release(qemu_pb2.ReleaseRequest(uid=uid), timeout=DEADLINE_S)

    async def processes(self) -> list[qemu_pb2.Process]:
        return list((await self.stub.List(qemu_pb2.ListRequest(), timeout=DEADLINE_S)).processes)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[AsyncIterator[qemu_pb2.Process]]:
        """What a watch tells once it told what was there."""
        call = self.stub.Watch(qemu_pb2.WatchRequest(), timeout=DEADLINE_S)
        responses = aiter(call)
        try:
            while not (await anext(responses)).synced:
                pass
            yield (response.process async for response in responses)
        finally:
            call.cancel()

    def instance(self, uid: str) -> InstanceRun:
        return self.run.instance(uid)

    async def end_of(self, pid: int) -> None:
        """Waits until a process has ended, whoever its parent is."""
        pidfd = os.pidfd_open(pid)
        try:
            readable, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], DEADLINE_S)
        finally:
            os.close(pidfd)
        assert readable

    def change_record(self, uid: str, **changes: object) -> None:
        """Makes a record say something else, while no helper runs."""
        path = self.instance(uid).process
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def qemu_pids(self) -> list[int]:
        """The QEMUs, and what is about to become one, that write into this house's directories."""
        pids = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            # A process that has ended but was not waited for has neither of the two, and others' are none of ours.
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                is_qemu = b"-sandbox" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if is_qemu and os.readlink(f"/proc/{pid}/fd/2").startswith(f"{self.run.instances}/"):
                    pids.append(int(pid))
        return pids


@asynccontextmanager
async def house() -> AsyncIterator[House]:
    """A house with its helper. Afterwards nothing of it is left, or the test has failed."""
    path = Path(tempfile.mkdtemp(prefix="q-", dir="/tmp"))  # a socket's path holds 107 bytes
    os.chmod(path, 0o755)  # programs in QEMU's place lie in it
    it = House(path)
    try:
        await it.open()
        yield it
        for process in await it.processes():
            await it.stub.Stop(qemu_pb2.StopRequest(uid=process.uid, generation=process.generation), timeout=DEADLINE_S)
            await it.release(process.uid)
        assert await it.close(signal.SIGTERM) == 0
        assert it.qemu_pids() == []
        assert list(it.run.instances.iterdir()) == []
        assert sorted(os.listdir(path)) == ["run", "state"]
    finally:
        for pid in it.qemu_pids():
            os.kill(pid, signal.SIGKILL)
        if it.helper is not None and it.helper.returncode is None:
            it.helper.kill()
            await it.helper.wait()
        if it.channel is not None:
            await it.channel.close()
        shutil.rmtree(path)
