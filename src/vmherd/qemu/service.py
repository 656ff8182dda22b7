"""The helper's gRPC service: converts, checks and calls."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import grpc
import structlog
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.host.host import Host
from vmherd.model.errors import FieldViolation, InvalidArgument, VmherdError
from vmherd.model.layout import StateDirectory
from vmherd.model.machine import Disk, DiskFormat, KernelBoot, Machine, Nic, NicBackend, PortForward, Protocol
from vmherd.model.names import check_uid
from vmherd.model.network import Network
from vmherd.qemu import command_line, files, launch, policy
from vmherd.qemu.command_line import Descriptors
from vmherd.qemu.files import Owners
from vmherd.qemu.network.networks import AddressSource, Networks
from vmherd.qemu.process import Process
from vmherd.qemu.process_table import Launch, ProcessTable

FORMATS = {qemu_pb2.Disk.RAW: DiskFormat.RAW, qemu_pb2.Disk.QCOW2: DiskFormat.QCOW2}
BACKENDS = {qemu_pb2.Nic.USER: NicBackend.USER, qemu_pb2.Nic.BRIDGE: NicBackend.BRIDGE}
PROTOCOLS = {qemu_pb2.PortForward.TCP: Protocol.TCP, qemu_pb2.PortForward.UDP: Protocol.UDP}
SOURCES = {
    AddressSource.LEASE: qemu_pb2.Address.LEASE,
    AddressSource.NEIGHBOUR: qemu_pb2.Address.NEIGHBOUR,
}
GRACE_MAX_S = 3600
DESCRIPTORS_FIRST = 3
LOGGED_MAX_LENGTH = 500
"""Of what a caller has a say in."""

_log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]


class QemuService(qemu_pb2_grpc.QemuServiceServicer):
    """Serves `vmherd.api.qemu.v1.QemuService`."""

    def __init__(
        self, processes: ProcessTable, host: Host, networks: Networks, state: StateDirectory, owners: Owners
    ) -> None:
        self._processes = processes
        self._host = host
        self._networks = networks
        self._state = state
        self._owners = owners

    async def Start(self, request: qemu_pb2.StartRequest, context: Context) -> qemu_pb2.Process:
        with _refusal_logged("Start", request.machine.uid):
            machine = self._checked(request.machine)
            return _from_process(await self._processes.start(machine, lambda: self._prepared(machine)))

    async def Stop(self, request: qemu_pb2.StopRequest, context: Context) -> qemu_pb2.Process:
        grace_s = request.grace.seconds + request.grace.nanos / 1e9
        with _refusal_logged("Stop", request.uid):
            violations = list(check_uid(request.uid))
            if not 0 <= grace_s <= GRACE_MAX_S:
                violations.append(FieldViolation("grace", f"must be from 0 to {GRACE_MAX_S} s, is {grace_s:g} s"))
            if violations:
                raise InvalidArgument.of(violations)
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
        with _refusal_logged("Release", request.uid):
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
            networks=map(_from_network, self._networks.networks),
        )
        for measurement in await self._host.measurements(qemu):
            accelerator = response.accelerators.add(
                name=measurement.accelerator, usable=measurement.usable, detail=measurement.detail
            )
            if measurement.elapsed_s is not None:
                accelerator.elapsed.FromTimedelta(timedelta(seconds=measurement.elapsed_s))
        return response

    async def Plan(self, request: qemu_pb2.PlanRequest, context: Context) -> qemu_pb2.PlanResponse:
        with _refusal_logged("Plan", request.machine.uid):
            machine = self._checked(request.machine)
            devices, rules = self._networks.plan(machine)
            qemu = await self._host.qemu()
            argv = command_line.argv(
                machine,
                qemu_binary=qemu.path,
                accelerator=await self._host.accelerator(qemu),
                descriptors=Descriptors.of(machine, itertools.count(DESCRIPTORS_FIRST)),
            )
            return qemu_pb2.PlanResponse(argv=argv, devices=devices, rules=rules)

    async def ListAddresses(
        self, request: qemu_pb2.ListAddressesRequest, context: Context
    ) -> qemu_pb2.ListAddressesResponse:
        found = await self._networks.addresses(request.uid)
        return qemu_pb2.ListAddressesResponse(
            addresses=(
                qemu_pb2.Address(
                    address=one.address, prefix_length=one.prefix_length, mac=one.mac, source=SOURCES[one.source]
                )
                for one in found
            )
        )

    def _checked(self, message: qemu_pb2.Machine) -> Machine:
        machine = _to_machine(message)
        policy.check_values(machine, state=self._state, host_memory_mib=self._host.memory_mib)
        self._networks.ports(machine)
        return machine

    @contextlib.asynccontextmanager
    async def _prepared(self, machine: Machine) -> AsyncIterator[Launch]:
        qemu = await self._host.qemu()
        accelerator = await self._host.accelerator(qemu)
        ports = self._networks.ports(machine)
        async with self._plugged(machine) as taps:
            others = {process.unix_uid for process in self._processes.running() if process.uid != machine.uid}
            with files.opened(machine, self._state, self._owners, others) as (uid, opened):
                inherited = (*opened, *taps)
                yield Launch(
                    unix_uid=uid,
                    argv=lambda sockets: command_line.argv(
                        machine,
                        qemu_binary=qemu.path,
                        accelerator=accelerator,
                        descriptors=Descriptors.of(machine, iter((*sockets, *inherited))),
                    ),
                    before=launch.chain(machine, uid, accelerator) if self._owners.machines else (),
                    descriptors=inherited,
                    ports=ports,
                )

    @contextlib.asynccontextmanager
    async def _plugged(self, machine: Machine) -> AsyncIterator[list[int]]:
        """The descriptors of a machine's TAPs. Where its start fails its ports go as well."""
        taps: dict[int, int] = {}
        try:
            taps = await self._networks.plug(machine)
            yield [taps[index] for index in sorted(taps)]
        except BaseException:
            await self._networks.unplug(machine.uid)
            raise
        finally:
            for tap in taps.values():
                os.close(tap)


@contextlib.contextmanager
def _refusal_logged(call: str, uid: str) -> Iterator[None]:
    try:
        yield
    except VmherdError as error:
        why = error.message[:LOGGED_MAX_LENGTH]
        _log.warning("refused", call=call, uid=uid[:LOGGED_MAX_LENGTH], reason=error.reason, why=why)
        raise


def _to_machine(message: qemu_pb2.Machine) -> Machine:
    unknown = [
        *(f"disks[{i}].format" for i, disk in enumerate(message.disks) if disk.format not in FORMATS),
        *(f"nics[{i}].backend" for i, nic in enumerate(message.nics) if nic.backend not in BACKENDS),
        *(
            f"nics[{i}].forwards[{j}].protocol"
            for i, nic in enumerate(message.nics)
            for j, forward in enumerate(nic.forwards)
            if forward.protocol not in PROTOCOLS
        ),
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
        nics=tuple(map(_to_nic, message.nics)),
    )


def _to_nic(message: qemu_pb2.Nic) -> Nic:
    forwards = (PortForward(PROTOCOLS[f.protocol], f.guest_port, f.host_port) for f in message.forwards)
    return Nic(message.mac, BACKENDS[message.backend], message.network, message.ipv4_address, tuple(forwards))


def _from_network(network: Network) -> qemu_pb2.Network:
    return qemu_pb2.Network(
        name=network.name,
        bridge=network.bridge,
        subnet=_text(network.subnet),
        gateway=_text(network.gateway),
        ipv6_subnet=_text(network.ipv6_subnet),
        isolated=network.isolated,
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


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
        unix_uid=process.unix_uid,
    )


def _from_seconds(since_epoch_s: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(since_epoch_s * 1e9))
    return timestamp
