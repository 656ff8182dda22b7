"""A helper without machines: a real gRPC server on a unix socket, with the host and the addresses that tests set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.model.errors import VmherdError
from vmherd.rpc.serving import serving


class FakeHelper(qemu_pb2_grpc.QemuServiceServicer):
    """Starts nothing and says that it did. `processes` are those that it knows from the start."""

    def __init__(self) -> None:
        self.networks: list[qemu_pb2.Network] = []
        self.addresses: list[qemu_pb2.Address] = []
        self.asked_for_addresses = asyncio.Semaphore(0)
        """Released whenever somebody asks."""
        self.processes: list[qemu_pb2.Process] = []
        self.started: list[qemu_pb2.Machine] = []
        self.refusal: VmherdError | None = None
        """What Start and ListAddresses are answered with."""

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[qemu_pb2.WatchResponse]:  # noqa: N802
        for process in self.processes:
            yield qemu_pb2.WatchResponse(process=process)
        yield qemu_pb2.WatchResponse(synced=True)
        await asyncio.Event().wait()

    async def Host(self, request: Any, context: Any) -> qemu_pb2.HostResponse:  # noqa: N802
        return qemu_pb2.HostResponse(memory_mib=4096, accelerator="tcg", networks=self.networks)

    async def Plan(self, request: Any, context: Any) -> qemu_pb2.PlanResponse:  # noqa: N802
        devices = [f"a TAP device on {nic.network}" for nic in request.machine.nics if nic.network]
        rules = [f"ether saddr {nic.mac}" for nic in request.machine.nics if nic.network]
        return qemu_pb2.PlanResponse(argv=["qemu", request.machine.name], devices=devices, rules=rules)

    async def Start(self, request: Any, context: Any) -> qemu_pb2.Process:  # noqa: N802
        self.started.append(request.machine)
        if self.refusal:
            raise self.refusal
        return qemu_pb2.Process(uid=request.machine.uid, generation=request.machine.generation, pid=42)

    async def Release(self, request: Any, context: Any) -> Empty:  # noqa: N802
        return Empty()

    async def ListAddresses(self, request: Any, context: Any) -> qemu_pb2.ListAddressesResponse:  # noqa: N802
        self.asked_for_addresses.release()
        if self.refusal:
            raise self.refusal
        return qemu_pb2.ListAddressesResponse(addresses=self.addresses)


@asynccontextmanager
async def fake_helper(socket: Path, helper: FakeHelper) -> AsyncIterator[FakeHelper]:
    """Serves a fake helper on this socket."""

    def add(server: grpc.aio.Server) -> None:
        qemu_pb2_grpc.add_QemuServiceServicer_to_server(helper, server)

    async with serving({qemu_pb2.DESCRIPTOR.services_by_name["QemuService"].full_name: add}, socket):
        yield helper
