"""The controller's side of the helper: its calls in terms of the model, and a watch that never gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Protocol, TypeVar

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.model.errors import Unavailable, VmherdError
from vmherd.model.instance import Address, Source
from vmherd.model.machine import Machine, Nic
from vmherd.model.network import Network
from vmherd.rpc.status import from_rpc_error

T = TypeVar("T")

_log = structlog.get_logger()

CALL_TIMEOUT_S = 60.0
"""Long, because the first question about the host makes the helper measure its accelerators."""

ADDRESSES_TIMEOUT_S = 5.0
"""For a question that is asked again anyway."""

PATIENCE_S = 1.0
"""How long the helper may take to answer before it counts as lost; a connection is made in milliseconds."""

RECONNECT_DELAY_S = 0.2

SOURCES = {qemu_pb2.Address.LEASE: Source.LEASE, qemu_pb2.Address.NEIGHBOUR: Source.NEIGHBOUR}


@dataclass(frozen=True)
class Process:
    """A QEMU process as the helper sees it."""

    uid: str
    generation: int
    pid: int
    ended_at_s: float | None = None
    """None while it runs."""
    exit_code: int | None = None
    signal: int | None = None
    stderr_tail: str = ""


@dataclass(frozen=True)
class Host:
    """The host as the helper describes it."""

    memory_mib: int
    accelerator: str
    why: str
    """Why it is this accelerator, for people."""
    networks: tuple[Network, ...] = ()
    """Networks that machines can be plugged into, the default first."""


@dataclass(frozen=True)
class MachinePlan:
    """What a start would run and make."""

    argv: tuple[str, ...]
    devices: tuple[str, ...]
    """The network devices, for people."""
    rules: tuple[str, ...]
    """The firewall rules, in the language of nft."""


class Listener(Protocol):
    """Who wants to hear what the helper tells."""

    def process_seen(self, process: Process) -> None:
        """A process is there, has started or has ended."""

    def all_seen(self, uids: frozenset[str]) -> None:
        """The helper was reached and these are all the processes that it knows."""

    def helper_lost(self) -> None:
        """The helper cannot be reached; nothing follows for the machines."""


class Helper:
    """Calls the helper; every call raises `VmherdError` as the helper meant it, `Unavailable` when there is none."""

    def __init__(self, channel: grpc.aio.Channel, socket: str) -> None:
        self._stub = qemu_pb2_grpc.QemuServiceStub(channel)
        self._socket = socket
        self._connected = asyncio.Event()
        self.lost = False
        """Whether the helper cannot be reached. Right after the start nobody knows: neither connected nor lost."""

    @property
    def connected(self) -> bool:
        """Whether the helper was there a moment ago."""
        return self._connected.is_set()

    async def wait_connected(self) -> None:
        """Waits until the helper can be reached."""
        await self._connected.wait()

    def check_connected(self) -> None:
        """Raises `Unavailable` when the helper cannot be reached, before anything is begun that needs it."""
        if not self.connected:
            raise self._unreachable()

    async def start(self, machine: Machine) -> Process:
        """Starts the machine, or finds it running: the same uid and generation is the same start."""
        return _process(await self._call(self._stub.Start, qemu_pb2.StartRequest(machine=_machine(machine))))

    async def kill(self, uid: str, generation: int) -> Process:
        """Ends a machine with SIGKILL; answers when it has ended."""
        request = qemu_pb2.StopRequest(uid=uid, generation=generation, grace=Duration())
        return _process(await self._call(self._stub.Stop, request))

    async def release(self, uid: str) -> None:
        """Forgets an ended machine and removes its run directory."""
        await self._call(self._stub.Release, qemu_pb2.ReleaseRequest(uid=uid))

    async def plan(self, machine: Machine) -> MachinePlan:
        """What `start` would run and make."""
        response = await self._call(self._stub.Plan, qemu_pb2.PlanRequest(machine=_machine(machine)))
        return MachinePlan(tuple(response.argv), tuple(response.devices), tuple(response.rules))

    async def addresses(self, uid: str) -> tuple[Address, ...]:
        """A machine's addresses on the host's networks, as DHCP leases and the neighbour table show them."""
        request = qemu_pb2.ListAddressesRequest(uid=uid)
        response = await self._call(self._stub.ListAddresses, request, timeout_s=ADDRESSES_TIMEOUT_S)
        return tuple(_address(address) for address in response.addresses if address.source in SOURCES)

    async def host(self) -> Host:
        """Describes the host."""
        response = await self._call(self._stub.Host, qemu_pb2.HostRequest())
        told = "; ".join(
            f"{a.name}: {a.detail or f'{a.elapsed.ToTimedelta().total_seconds():.2f} s of measured work'}"
            for a in response.accelerators
        )
        why = told or "as the settings of the helper say"
        return Host(response.memory_mib, response.accelerator, why, tuple(map(_network, response.networks)))

    async def follow(self, listener: Listener) -> None:
        """Tells the listener what the helper tells, over every loss of the connection, until cancelled."""
        while True:
            try:
                await self._follow_once(listener)
                why = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                why = error.details() or error.code().name
            self._lose(listener, why)
            await asyncio.sleep(RECONNECT_DELAY_S)

    async def _follow_once(self, listener: Listener) -> None:
        # The channel connects as soon as there is somebody to connect to; until then the call just waits.
        call = self._stub.Watch(qemu_pb2.WatchRequest(), wait_for_ready=True)
        impatience = asyncio.get_running_loop().call_later(PATIENCE_S, self._lose, listener, "nobody answers")
        at_first: list[Process] = []
        try:
            async for message in call:
                if message.synced:
                    impatience.cancel()
                    self._come_up(listener, at_first)
                elif self.connected:
                    listener.process_seen(_process(message.process))
                else:
                    at_first.append(_process(message.process))
        finally:
            impatience.cancel()
            call.cancel()  # an abandoned stream would leak its handler over there

    def _come_up(self, listener: Listener, processes: list[Process]) -> None:
        # Whoever hears of a process can make calls already.
        _log.info("connected to the helper", socket=self._socket, processes=len(processes))
        self.lost = False
        self._connected.set()
        for process in processes:
            listener.process_seen(process)
        listener.all_seen(frozenset(process.uid for process in processes))

    def _lose(self, listener: Listener, why: str) -> None:
        if not self.lost:
            _log.warning("waiting for the helper; its machines run on", socket=self._socket, why=why)
        self.lost = True
        self._connected.clear()
        listener.helper_lost()

    async def _call(
        self, method: Callable[..., Awaitable[T]], request: Message, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> T:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._meaning(error) from error

    def _meaning(self, error: grpc.aio.AioRpcError) -> VmherdError:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return self._unreachable()
        return from_rpc_error(error)

    def _unreachable(self) -> Unavailable:
        return Unavailable(
            f"the helper cannot be reached at {self._socket}; is `vmherd qemu` running?",
            reason="HELPER_UNREACHABLE",
            metadata={"socket": self._socket},
        )


def _machine(machine: Machine) -> qemu_pb2.Machine:
    return qemu_pb2.Machine(
        uid=machine.uid,
        name=machine.name,
        generation=machine.generation,
        cpus=machine.cpus,
        memory_mib=machine.memory_mib,
        kernel_boot=qemu_pb2.KernelBoot(
            kernel=machine.kernel_boot.kernel,
            initramfs=machine.kernel_boot.initramfs,
            command_line=machine.kernel_boot.command_line,
        ),
        disks=[
            qemu_pb2.Disk(path=disk.path, format=qemu_pb2.Disk.Format.Value(disk.format.name), read_only=disk.read_only)
            for disk in machine.disks
        ],
        nics=map(_nic, machine.nics),
    )


def _nic(nic: Nic) -> qemu_pb2.Nic:
    return qemu_pb2.Nic(
        mac=nic.mac,
        backend=qemu_pb2.Nic.Backend.Value(nic.backend.name),
        network=nic.network,
        ipv4_address=nic.ipv4_address,
        forwards=[
            qemu_pb2.PortForward(
                protocol=qemu_pb2.PortForward.Protocol.Value(forward.protocol.name),
                host_port=forward.host_port,
                guest_port=forward.guest_port,
            )
            for forward in nic.forwards
        ],
    )


def _network(message: qemu_pb2.Network) -> Network:
    return Network(
        name=message.name,
        bridge=message.bridge,
        subnet=IPv4Network(message.subnet) if message.subnet else None,
        ipv6_subnet=IPv6Network(message.ipv6_subnet) if message.ipv6_subnet else None,
        isolated=message.isolated,
    )


def _address(message: qemu_pb2.Address) -> Address:
    return Address(message.address, message.prefix_length, message.mac, source=SOURCES[message.source])


def _process(message: qemu_pb2.Process) -> Process:
    return Process(
        uid=message.uid,
        generation=message.generation,
        pid=message.pid,
        ended_at_s=message.end_time.ToNanoseconds() / 1e9 if message.HasField("end_time") else None,
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        signal=message.signal if message.HasField("signal") else None,
        stderr_tail=message.stderr_tail,
    )
