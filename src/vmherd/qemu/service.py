"""The helper's gRPC service: converts, checks and calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import grpc
import structlog
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.model.errors import FieldViolation, InvalidArgument, VmherdError
from vmherd.model.layout import RunDirectory, StateDirectory
from vmherd.model.machine import Disk, DiskFormat, KernelBoot, Machine, Nic, NicBackend
from vmherd.model.names import check_uid
from vmherd.qemu import command_line, policy
from vmherd.qemu.host import Host
from vmherd.qemu.process import Process
from vmherd.qemu.process_table import ProcessTable

FORMATS = {qemu_pb2.Disk.RAW: DiskFormat.RAW, qemu_pb2.Disk.QCOW2: DiskFormat.QCOW2}
BACKENDS = {qemu_pb2.Nic.USER: NicBackend.USER}
GRACE_MAX_S = 3600

_log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]


class QemuService(qemu_pb2_grpc.QemuServiceServicer):
    """Serves `vmherd.api.qemu.v1.QemuService`."""

    def __init__(self, processes: ProcessTable, host: Host, run: RunDirectory, state: StateDirectory) -> None:
        self._processes = processes
        self._host = host
        self._run = run
        self._state = state

    async def Start(self, request: qemu_pb2.StartRequest, context: Context) -> qemu_pb2.Process:
        machine = self._checked(request.machine)

        async def plan() -> tuple[str, ...]:
            with _refusal_logged(machine.uid):
                await asyncio.to_thread(policy.check_files, machine, state=self._state)
            return await self._argv(machine)

        return _from_process(await self._processes.start(machine, plan))

    async def Stop(self, request: qemu_pb2.StopRequest, context: Context) -> qemu_pb2.Process:
        grace_s = request.grace.seconds + request.grace.nanos / 1e9
        if not 0 <= grace_s <= GRACE_MAX_S:
            raise InvalidArgument.of([FieldViolation("grace", f"must be from 0 to {GRACE_MAX_S} s, is {grace_s:g} s")])
        return _from_process(await self._processes.stop(request.uid, request.generation, grace_s=grace_s))

    async def List(self, request: qemu_pb2.ListRequest, context: Context) -> qemu_pb2.ListResponse:
        return qemu_pb2.ListResponse(processes=map(_from_process, self._processes.list()))

    async def Watch(self, request: qemu_pb2.WatchRequest, context: Context) -> AsyncIterator[qemu_pb2.WatchResponse]:
        async with contextlib.aclosing(self._processes.watch()) as processes:
            async for process in processes:
                if process is None:
                    yield qemu_pb2.WatchResponse(synced=True)
                else:
                    yield qemu_pb2.WatchResponse(process=_from_process(process))

    async def Release(self, request: qemu_pb2.ReleaseRequest, context: Context) -> Empty:
        if violations := list(check_uid(request.uid)):
            raise InvalidArgument.of(violations)
        await self._processes.release(request.uid)
        return Empty()

    async def Host(self, request: qemu_pb2.HostRequest, context: Context) -> qemu_pb2.HostResponse:
        qemu = await self._host.qemu()
        response = qemu_pb2.HostResponse(
            qemu_version=qemu.version,
            machine_types=qemu.machine_types,
            accelerator=await self._host.accelerator(qemu),
            memory_mib=self._host.memory_mib,
            cpus=self._host.cpus,
        )
        for measurement in await self._host.measurements(qemu):
            accelerator = response.accelerators.add(
                name=measurement.accelerator, usable=measurement.usable, detail=measurement.detail
            )
            if measurement.elapsed_s is not None:
                accelerator.elapsed.FromTimedelta(timedelta(seconds=measurement.elapsed_s))
        return response

    async def Plan(self, request: qemu_pb2.PlanRequest, context: Context) -> qemu_pb2.PlanResponse:
        return qemu_pb2.PlanResponse(argv=await self._argv(self._checked(request.machine)))

    def _checked(self, message: qemu_pb2.Machine) -> Machine:
        with _refusal_logged(message.uid):
            machine = _to_machine(message)
            policy.check_values(machine, state=self._state, host_memory_mib=self._host.memory_mib)
        return machine

    async def _argv(self, machine: Machine) -> tuple[str, ...]:
        qemu = await self._host.qemu()
        return command_line.argv(
            machine,
            qemu_binary=qemu.path,
            accelerator=await self._host.accelerator(qemu),
            run=self._run.instance(machine.uid),
            console_log=self._state.instance(machine.uid).console_log,
        )


@contextlib.contextmanager
def _refusal_logged(uid: str) -> Iterator[None]:
    try:
        yield
    except VmherdError as error:
        _log.warning("machine refused", uid=uid, reason=error.reason, why=error.message)
        raise


def _to_machine(message: qemu_pb2.Machine) -> Machine:
    unknown = [
        *(f"disks[{i}].format" for i, disk in enumerate(message.disks) if disk.format not in FORMATS),
        *(f"nics[{i}].backend" for i, nic in enumerate(message.nics) if nic.backend not in BACKENDS),
    ]
    if unknown:
        raise InvalidArgument.of(FieldViolation(field, "must be given, and one that exists") for field in unknown)
    boot = message.kernel_boot
    return Machine(
        uid=message.uid,
        name=message.name,
        generation=message.generation,
        cpus=message.cpus,
        memory_mib=message.memory_mib,
        kernel_boot=KernelBoot(boot.kernel, boot.initramfs, boot.command_line),
        disks=tuple(Disk(disk.path, FORMATS[disk.format], disk.read_only) for disk in message.disks),
        nics=tuple(Nic(nic.mac, BACKENDS[nic.backend]) for nic in message.nics),
    )


def _from_process(process: Process) -> qemu_pb2.Process:
    return qemu_pb2.Process(
        uid=process.uid,
        name=process.name,
        generation=process.generation,
        pid=process.pid or 0,
        start_time=_from_seconds(process.started_at_s),
        end_time=None if process.ended_at_s is None else _from_seconds(process.ended_at_s),
        exit_code=process.exit_code,
        signal=process.signal,
        stderr_tail=process.stderr_tail,
    )


def _from_seconds(since_epoch_s: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(since_epoch_s * 1e9))
    return timestamp
