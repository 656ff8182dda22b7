"""Puts the controller together and runs it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import structlog

from vmherd.api.settings.v1.settings_pb2 import ControllerSettings
from vmherd.api.v1 import controller_pb2, controller_pb2_grpc, guest_pb2, guest_pb2_grpc
from vmherd.controller.guest import GuestServicer
from vmherd.controller.helper import Helper
from vmherd.controller.herd import Herd
from vmherd.controller.service import ControllerServicer
from vmherd.controller.store import SqliteStore, StoreError
from vmherd.controller.supervisor import World
from vmherd.image.registry import ImageRegistry
from vmherd.model.errors import FailedPrecondition
from vmherd.model.layout import RunDirectory, StateDirectory
from vmherd.rpc.channel import open_channel
from vmherd.rpc.serving import check_socket_path, serving, until_signalled

_log = structlog.get_logger()

STOP_GRACE_DEFAULT_S = 30.0
AGENT_TIMEOUT_DEFAULT_S = 10.0


async def run(settings: ControllerSettings) -> None:
    """Runs the controller until SIGTERM or SIGINT. Every instance runs on after that.

    Raises:
        FailedPrecondition: a path of the settings cannot be used, or another controller uses it.
    """
    run_directory, state = RunDirectory(Path(settings.run_dir)), StateDirectory(Path(settings.state_dir))
    check_socket_path(run_directory.longest_socket_path())
    token = _read_token(settings.token_file) if settings.listen_tcp else ""
    store = _open_store(state)
    channel = open_channel(Path(settings.qemu))
    try:
        world = World(
            store=store,
            helper=Helper(channel, settings.qemu),
            images=ImageRegistry(state.images),
            run=run_directory,
            state=state,
            stop_grace_s=_seconds(settings, "stop_grace", STOP_GRACE_DEFAULT_S),
        )
        herd = Herd(world)
        guest = GuestServicer(herd, _seconds(settings, "agent_timeout", AGENT_TIMEOUT_DEFAULT_S))
        await herd.open()
        services = {
            controller_pb2.DESCRIPTOR.services_by_name["ControllerService"].full_name: lambda server: (
                controller_pb2_grpc.add_ControllerServiceServicer_to_server(ControllerServicer(herd, store), server)
            ),
            guest_pb2.DESCRIPTOR.services_by_name["GuestService"].full_name: lambda server: (
                guest_pb2_grpc.add_GuestServiceServicer_to_server(
                    cast(guest_pb2_grpc.GuestServiceServicer, guest), server
                )
            ),
        }
        try:
            async with serving(services, Path(settings.listen), tcp=settings.listen_tcp, token=token) as port:
                _log.info("controller is ready", socket=settings.listen, tcp_port=port)
                await until_signalled()
        finally:
            await herd.close()
    finally:
        await channel.close()
        await store.close()


def _open_store(state: StateDirectory) -> SqliteStore:
    try:
        state.instances.mkdir(parents=True, exist_ok=True)
        return SqliteStore(state.store)
    except (OSError, StoreError) as error:
        raise FailedPrecondition(
            f"the state directory {state.path} cannot be used: {error}", reason="STATE_NOT_USABLE"
        ) from error


def _read_token(path: str) -> str:
    try:
        token = Path(path).read_text().strip()
    except OSError as error:
        raise FailedPrecondition(
            f"cannot read the token file {path}: {error.strerror}; gRPC on TCP needs one", reason="TOKEN_NOT_READABLE"
        ) from error
    if not token:
        raise FailedPrecondition(f"the token file {path} is empty; gRPC on TCP needs one", reason="TOKEN_NOT_READABLE")
    return token


def _seconds(settings: ControllerSettings, field: str, default_s: float) -> float:
    value: float = getattr(settings, field).ToTimedelta().total_seconds()
    return value if settings.HasField(field) else default_s  # type: ignore[arg-type]  # the field's name varies
