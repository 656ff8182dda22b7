"""ControllerService: every RPC takes its message apart, asks the herd, and puts the answer together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import empty_pb2

from vmherd.api.v1 import controller_pb2, controller_pb2_grpc, instance_pb2
from vmherd.controller import convert, views
from vmherd.controller.herd import Herd
from vmherd.controller.store import Store
from vmherd.model.instance import Verb

Context = grpc.aio.ServicerContext[Any, Any]


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    """See protos/vmherd/api/v1/controller.proto."""

    def __init__(self, herd: Herd, store: Store) -> None:
        self._herd = herd
        self._store = store

    async def Launch(self, request: controller_pb2.LaunchRequest, context: Context) -> instance_pb2.Instance:
        snapshot = await self._herd.launch(convert.launch_spec(request), convert.fingerprint(request))
        return convert.instance_message(snapshot)

    async def Start(self, request: controller_pb2.StartRequest, context: Context) -> instance_pb2.Instance:
        return convert.instance_message(
            await self._herd.command(
                Verb.START, request.name, convert.fingerprint(request), request_id=request.request_id
            )
        )

    async def Stop(self, request: controller_pb2.StopRequest, context: Context) -> instance_pb2.Instance:
        return await self._stop(Verb.STOP, request)

    async def Restart(self, request: controller_pb2.RestartRequest, context: Context) -> instance_pb2.Instance:
        return await self._stop(Verb.RESTART, request)

    async def _stop(
        self, verb: Verb, request: controller_pb2.StopRequest | controller_pb2.RestartRequest
    ) -> instance_pb2.Instance:
        grace_s = convert.seconds(request, "grace", default_s=0) if request.HasField("grace") else None
        return convert.instance_message(
            await self._herd.command(
                verb,
                request.name,
                convert.fingerprint(request),
                request_id=request.request_id,
                force=request.force,
                grace_s=grace_s,
            )
        )

    async def Delete(self, request: controller_pb2.DeleteRequest, context: Context) -> empty_pb2.Empty:
        await self._herd.command(
            Verb.DELETE,
            request.name,
            convert.fingerprint(request),
            request_id=request.request_id,
            force=request.force,
        )
        return empty_pb2.Empty()

    async def Info(self, request: controller_pb2.InfoRequest, context: Context) -> instance_pb2.Instance:
        return convert.instance_message(views.snapshot_of(self._herd.find(request.name)))

    async def List(self, request: controller_pb2.ListRequest, context: Context) -> controller_pb2.ListResponse:
        page = views.page_of(
            self._herd.supervisors,
            self._herd.revision,
            page_size=request.page_size,
            page_token=request.page_token,
            label_selector=request.label_selector,
        )
        return controller_pb2.ListResponse(
            instances=[convert.instance_message(snapshot) for snapshot in page.snapshots],
            next_page_token=page.next_page_token,
            revision=page.revision,
        )

    async def Pause(self, request: controller_pb2.PauseRequest, context: Context) -> instance_pb2.Instance:
        return convert.instance_message(await self._herd.pause(request.name))

    async def Resume(self, request: controller_pb2.ResumeRequest, context: Context) -> instance_pb2.Instance:
        return convert.instance_message(await self._herd.resume(request.name))

    async def Wait(
        self, request: controller_pb2.WaitRequest, context: Context
    ) -> AsyncIterator[controller_pb2.WaitResponse]:
        timeout_s = convert.seconds(request, "timeout", default_s=convert.WAIT_TIMEOUT_DEFAULT_S)
        async for progress in views.wait(self._herd.find(request.name), convert.rung_of(request.until), timeout_s):
            yield convert.wait_message(progress)

    async def Watch(
        self, request: controller_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[controller_pb2.WatchResponse]:
        async for change in views.watch(self._store, request.from_revision, request.name):
            yield convert.watch_message(change)

    async def Plan(self, request: controller_pb2.PlanRequest, context: Context) -> controller_pb2.PlanResponse:
        plan = await self._herd.plan(convert.launch_spec(request.launch))
        return controller_pb2.PlanResponse(
            instance=convert.plan_instance(plan.instance),
            argv=plan.machine.argv,
            accelerator=plan.accelerator,
            devices=plan.machine.devices,
            rules=plan.machine.rules,
        )

    async def Update(self, request: controller_pb2.UpdateRequest, context: Context) -> instance_pb2.Instance:
        autostart = request.autostart if request.HasField("autostart") else None
        return convert.instance_message(await self._herd.update(request.name, wants_autostart=autostart))

    async def ListNetworks(
        self, request: controller_pb2.ListNetworksRequest, context: Context
    ) -> controller_pb2.ListNetworksResponse:
        return controller_pb2.ListNetworksResponse(networks=map(convert.network_message, await self._herd.networks()))
