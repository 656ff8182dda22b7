"""A controller that keeps its instances in a dict: a real gRPC server on a unix socket, with answers that tests set."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from vmherd.api.v1 import controller_pb2, controller_pb2_grpc, file_pb2, file_pb2_grpc, process_pb2, process_pb2_grpc
from vmherd.api.v1.controller_pb2 import (
    ListNetworksResponse,
    ListResponse,
    Network,
    PlanResponse,
    WaitResponse,
    WatchResponse,
)
from vmherd.api.v1.instance_pb2 import Address, Exit, Hardware, Instance, Readiness
from vmherd.api.v1.process_pb2 import ExecRequest, ListProcessesResponse, Process, ProcessEvent
from vmherd.model.errors import NotFound, VmherdError, illegal_transition, instance_not_found, name_taken
from vmherd.rpc.serving import serving

START_TIMEOUT_S = 30.0


def ready_up_to(rung: int) -> Readiness:
    """A readiness with every rung up to this one, a tenth of a second each."""
    steps = [Readiness.Step(rung=r, elapsed=Duration(nanos=r * 100_000_000)) for r in range(1, rung + 1)]
    return Readiness(reached=rung, steps=steps)


class FakeController:
    """What the fake knows and does; tests change it and look at it."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}
        self.requests: list[Message] = []
        self.errors: dict[str, VmherdError] = {}
        """By the name of the request's message: what the call is answered with."""
        self.run_answer = process_pb2.RunResponse()
        self.events: list[ProcessEvent] = []
        """What Exec and FollowProcess are answered with."""
        self.told: list[ExecRequest] = []
        """What Exec was told after the command."""
        self.processes: dict[str, Process] = {}
        self.holds_exec = False
        self.takes_input = True
        self.files: dict[str, bytes | None] = {"/": None}
        """The files of every guest by their paths; None is a folder."""
        self.file_notice = ""
        self.launch_state = Instance.RUNNING
        self.page_size_max = 1000
        self.holds_waits = False
        """Whether a wait goes on after its first rung until the caller leaves."""
        self.ignores_shutdown: set[str] = set()
        """The instances that only force stops."""
        self.ends_by_itself: set[str] = set()
        """The instances whose guests go down right before they are asked to."""
        self.networks: list[Network] = []

    def add(self, name: str, state: Instance.State.ValueType = Instance.RUNNING, **fields: Any) -> Instance:
        """An instance that is there."""
        defaults = {
            "uid": "00000000-0000-4000-8000-000000000000",
            "image": "builtin",
            "hardware": Hardware(cpus=1, memory_mib=128),
            "generation": 1,
        }
        instance = Instance(name=name, state=state, **(defaults | fields))
        self.instances[name] = instance
        return instance

    def received(self, request: Message) -> None:
        """Notes a request, and fails it where a test wants that."""
        self.requests.append(request)
        if error := self.errors.get(type(request).__name__):
            raise error

    def named(self, name: str) -> Instance:
        """The instance of this name."""
        if name not in self.instances:
            raise instance_not_found(name)
        return self.instances[name]


class _Instances(controller_pb2_grpc.ControllerServiceServicer):
    def __init__(self, fake: FakeController) -> None:
        self._fake = fake

    async def Launch(self, request: Any, context: Any) -> Instance:
        self._fake.received(request)
        if request.name in self._fake.instances:
            raise name_taken(request.name)
        state = self._fake.launch_state if request.start else Instance.STOPPED
        given = {"labels": request.labels, "nics": request.nics, "autostart": request.autostart}
        instance = self._fake.add(request.name, state, **given)
        if state == Instance.FAILED:
            instance.last_exit.CopyFrom(Exit(cause=Exit.START_FAILED, detail="no room\x1b[2J"))
        return instance

    async def Start(self, request: Any, context: Any) -> Instance:
        return self._move(request, "start", Instance.STOPPED, Instance.RUNNING)

    async def Stop(self, request: Any, context: Any) -> Instance:
        if request.name in self._fake.ignores_shutdown and not request.force:
            self._fake.received(request)
            await asyncio.Event().wait()
        if request.name in self._fake.ends_by_itself:
            self._fake.named(request.name).state = Instance.STOPPED
        instance = self._move(request, "stop", Instance.RUNNING, Instance.STOPPED)
        instance.last_exit.CopyFrom(Exit(cause=Exit.STOPPED, stop_step=Exit.KILL if request.force else Exit.AGENT))
        return instance

    async def Restart(self, request: Any, context: Any) -> Instance:
        return self._move(request, "restart", Instance.RUNNING, Instance.RUNNING)

    async def Pause(self, request: Any, context: Any) -> Instance:
        return self._move(request, "pause", Instance.RUNNING, Instance.PAUSED)

    async def Resume(self, request: Any, context: Any) -> Instance:
        return self._move(request, "resume", Instance.PAUSED, Instance.RUNNING)

    async def Delete(self, request: Any, context: Any) -> Empty:
        self._fake.received(request)
        instance = self._fake.named(request.name)
        if instance.state == Instance.RUNNING and not request.force:
            raise illegal_transition(request.name, "delete", "RUNNING", ["STOPPED"])
        del self._fake.instances[request.name]
        return Empty()

    async def Info(self, request: Any, context: Any) -> Instance:
        self._fake.received(request)
        return self._fake.named(request.name)

    async def List(self, request: Any, context: Any) -> ListResponse:
        self._fake.received(request)
        names = sorted(name for name in self._fake.instances if name > request.page_token)
        size = min(request.page_size, self._fake.page_size_max)
        page = [self._fake.instances[name] for name in names[:size]]
        return ListResponse(instances=page, next_page_token=names[size - 1] if len(names) > size else "", revision=7)

    async def Wait(self, request: Any, context: Any) -> AsyncIterator[WaitResponse]:
        self._fake.received(request)
        instance = self._fake.named(request.name)
        for rung in Readiness.Rung.values():
            instance.readiness.CopyFrom(ready_up_to(rung))
            if rung == Readiness.ADDRESS:
                instance.addresses.append(Address(address="10.0.2.15", prefix_length=24, interface="eth0"))
            done = rung == request.until
            yield WaitResponse(instance=instance, waiting_for="" if done else "the next rung")
            if done:
                return
            if rung == Readiness.PROCESS and self._fake.holds_waits:
                await asyncio.Event().wait()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[WatchResponse]:
        self._fake.received(request)
        for instance in self._fake.instances.values():
            yield WatchResponse(kind=WatchResponse.CURRENT, revision=5, instance=instance)
        yield WatchResponse(kind=WatchResponse.SYNCED, revision=5)
        for instance in self._fake.instances.values():
            yield WatchResponse(kind=WatchResponse.DELETED, revision=6, instance=instance)

    async def Plan(self, request: Any, context: Any) -> PlanResponse:
        self._fake.received(request)
        argv = ["qemu-system-x86_64", "-name", f"guest={request.launch.name}", "-append", "a b"]
        instance = Instance(name=request.launch.name, nics=request.launch.nics)
        devices, rules = ["tap vm0 on br0"] * len(instance.nics), ["chain port-vm0 {\n\tdrop\n}"] * len(instance.nics)
        return PlanResponse(instance=instance, argv=argv, accelerator="TCG, as measured", devices=devices, rules=rules)

    async def Update(self, request: Any, context: Any) -> Instance:
        self._fake.received(request)
        instance = self._fake.named(request.name)
        if request.HasField("autostart"):
            instance.autostart = request.autostart
        return instance

    async def ListNetworks(self, request: Any, context: Any) -> ListNetworksResponse:
        self._fake.received(request)
        return ListNetworksResponse(networks=self._fake.networks)

    def _move(self, request: Any, verb: str, source: int, target: Instance.State.ValueType) -> Instance:
        self._fake.received(request)
        instance = self._fake.named(request.name)
        if instance.state != source:
            legal = [Instance.State.Name(source)]
            raise illegal_transition(request.name, verb, Instance.State.Name(instance.state), legal)
        instance.state = target
        return instance


class _Processes(process_pb2_grpc.ProcessServiceServicer):
    def __init__(self, fake: FakeController) -> None:
        self._fake = fake

    async def Run(self, request: Any, context: Any) -> process_pb2.RunResponse:
        self._fake.received(request)
        self._fake.named(request.name)
        return self._fake.run_answer

    async def Exec(self, request_iterator: Any, context: Any) -> AsyncIterator[ProcessEvent]:
        """Gives the events that a test wants; with `holds_exec` the last one after the end of the input, or `end`."""
        requests = aiter(request_iterator)
        first = await anext(requests)
        self._fake.received(first.run)
        self._fake.named(first.run.name)
        *events, last = self._fake.events or [ProcessEvent(process=Process(state=Process.EXITED))]
        for event in events:
            yield event
        taken_bytes = 0
        if first.input_follows or self._fake.holds_exec:
            async for request in requests:
                self._fake.told.append(request)
                taken_bytes += len(request.input)
                if request.input and self._fake.takes_input:
                    yield ProcessEvent(input_taken=taken_bytes)
                if request.HasField("end") or request == ExecRequest(input=b""):
                    break
        yield last

    async def StartProcess(self, request: Any, context: Any) -> Process:
        self._fake.received(request)
        self._fake.named(request.name)
        process = Process(id=f"{len(self._fake.processes):08x}", pid=42, command=request.command, state=Process.RUNNING)
        self._fake.processes[process.id] = process
        return process

    async def ListProcesses(self, request: Any, context: Any) -> ListProcessesResponse:
        self._fake.received(request)
        self._fake.named(request.name)
        ids = sorted(process_id for process_id in self._fake.processes if process_id > request.page_token)
        size = min(request.page_size, self._fake.page_size_max)
        page = [self._fake.processes[process_id] for process_id in ids[:size]]
        return ListProcessesResponse(processes=page, next_page_token=ids[size - 1] if len(ids) > size else "")

    async def FollowProcess(self, request: Any, context: Any) -> AsyncIterator[ProcessEvent]:
        self._fake.received(request)
        yield ProcessEvent(process=self._fake.processes[request.id])
        for event in self._fake.events:
            yield event

    async def SignalProcess(self, request: Any, context: Any) -> Process:
        self._fake.received(request)
        return self._fake.processes[request.id]

    async def DeleteProcess(self, request: Any, context: Any) -> Empty:
        self._fake.received(request)
        del self._fake.processes[request.id]
        return Empty()


class _Files(file_pb2_grpc.FileServiceServicer):
    def __init__(self, fake: FakeController) -> None:
        self._fake = fake

    async def ReadFile(self, request: Any, context: Any) -> AsyncIterator[file_pb2.ReadFileResponse]:
        self._fake.received(request)
        self._fake.named(request.name)
        if request.path not in self._fake.files:
            raise NotFound(f"{request.path}: No such file or directory", reason="GUEST_FILE_NOT_FOUND")
        data = self._fake.files[request.path]
        yield file_pb2.ReadFileResponse(
            description=file_pb2.FileDescription(path=request.path, is_folder=data is None, mode=0o640)
        )
        if not request.describe_only:
            yield file_pb2.ReadFileResponse(data=data or b"")
            yield file_pb2.ReadFileResponse(digest=self._digest(data or b""))

    async def WriteFile(self, request_iterator: Any, context: Any) -> file_pb2.WriteFileResponse:
        header = (await anext(request_iterator)).header
        self._fake.received(header)
        self._fake.named(header.name)
        data = b""
        async for request in request_iterator:
            data += request.data
            if request.end:
                self._fake.files[header.path] = data
        return file_pb2.WriteFileResponse(path=header.path, digest=self._digest(data))

    def _digest(self, data: bytes) -> file_pb2.FileDigest:
        sha256 = hashlib.sha256(data).hexdigest()
        return file_pb2.FileDigest(size_bytes=len(data), sha256=sha256, verified=True, notice=self._fake.file_notice)


@contextmanager
def fake_controller(socket: Path) -> Iterator[FakeController]:
    """A fake controller that serves on this socket from a thread of its own."""
    fake = FakeController()
    services = {
        controller_pb2.DESCRIPTOR.services_by_name["ControllerService"].full_name: partial(
            controller_pb2_grpc.add_ControllerServiceServicer_to_server, _Instances(fake)
        ),
        process_pb2.DESCRIPTOR.services_by_name["ProcessService"].full_name: partial(
            process_pb2_grpc.add_ProcessServiceServicer_to_server, _Processes(fake)
        ),
        file_pb2.DESCRIPTOR.services_by_name["FileService"].full_name: partial(
            file_pb2_grpc.add_FileServiceServicer_to_server, _Files(fake)
        ),
    }
    is_up = threading.Event()
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        async with serving(services, socket):
            is_up.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert is_up.wait(START_TIMEOUT_S), "the fake controller did not start"
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(START_TIMEOUT_S)
        assert not thread.is_alive()
        loop.close()
