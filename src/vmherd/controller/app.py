"""Puts the controller together and runs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import structlog

from vmherd.api.settings.v1.settings_pb2 import ControllerSettings
from vmherd.api.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    file_pb2,
    file_pb2_grpc,
    guest_pb2,
    guest_pb2_grpc,
    process_pb2,
    process_pb2_grpc,
)
from vmherd.controller.detached import Detached
from vmherd.controller.files import FileServicer
from vmherd.controller.guest import GuestServicer
from vmherd.controller.helper import Helper
from vmherd.controller.herd import Herd
from vmherd.controller.processes import ProcessServicer
from vmherd.controller.service import ControllerServicer
from vmherd.controller.store import SqliteStore, StoreError
from vmherd.controller.world import World
from vmherd.image.registry import ImageRegistry
from vmherd.model.errors import FailedPrecondition
from vmherd.model.layout import RunDirectory, StateDirectory
from vmherd.rpc.channel import open_channel
from vmherd.rpc.serving import check_socket_path, find_group, serve_until_signalled, serving
from vmherd.rpc.token import read_token

_log = structlog.get_logger()

STOP_GRACE_DEFAULT_S = 30.0
AGENT_TIMEOUT_DEFAULT_S = 10.0


async def run(settings: ControllerSettings) -> None:
    """Runs the controller until it is asked to end by a signal. Every instance runs on after that.

    Raises:
        FailedPrecondition: a path of the settings cannot be used, or another controller uses it.
    """
    run_directory, state = RunDirectory(Path(settings.run_dir)), StateDirectory(Path(settings.state_dir))
    check_socket_path(run_directory.longest_socket_path())
    token = read_token(Path(settings.token_file)) if settings.listen_tcp else ""
    group = find_group(settings.socket_group) if settings.socket_group else None
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_owned(state))
        store = _open_store(state)
        stack.push_async_callback(store.close)
        channel = await stack.enter_async_context(open_channel(Path(settings.qemu)))
        world = World(
            store=store,
            helper=Helper(channel, settings.qemu),
            images=ImageRegistry(state.images),
            run=run_directory,
            state=state,
            stop_grace_s=_seconds(settings, "stop_grace", STOP_GRACE_DEFAULT_S),
        )
        herd = Herd(world)
        stack.push_async_callback(herd.close)
        await herd.open()
        detached = Detached(store)
        stack.push_async_callback(detached.close)
        await detached.open(herd.supervisors)
        guest = GuestServicer(herd, _seconds(settings, "agent_timeout", AGENT_TIMEOUT_DEFAULT_S))
        services = {
            controller_pb2.DESCRIPTOR.services_by_name["ControllerService"].full_name: lambda server: (
                controller_pb2_grpc.add_ControllerServiceServicer_to_server(ControllerServicer(herd, store), server)
            ),
            guest_pb2.DESCRIPTOR.services_by_name["GuestService"].full_name: lambda server: (
                guest_pb2_grpc.add_GuestServiceServicer_to_server(
                    cast(guest_pb2_grpc.GuestServiceServicer, guest), server
                )
            ),
            process_pb2.DESCRIPTOR.services_by_name["ProcessService"].full_name: lambda server: (
                process_pb2_grpc.add_ProcessServiceServicer_to_server(ProcessServicer(herd, detached), server)
            ),
            file_pb2.DESCRIPTOR.services_by_name["FileService"].full_name: lambda server: (
                file_pb2_grpc.add_FileServiceServicer_to_server(FileServicer(herd), server)
            ),
        }
        port = await stack.enter_async_context(
            serving(services, Path(settings.listen), group=group, tcp=settings.listen_tcp, token=token)
        )
        _log.info("controller is ready", socket=settings.listen, tcp_port=port)
        await serve_until_signalled(f"serving on {settings.listen}")


@contextlib.contextmanager
def _owned(state: StateDirectory) -> Iterator[None]:
    """Makes the state directory and keeps other controllers out: each would drive the instances of the other."""
    with contextlib.ExitStack() as stack:
        try:
            state.instances.mkdir(parents=True, exist_ok=True)
            lock = os.open(state.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _not_usable(state, "another controller works in it") from error
        except OSError as error:
            raise _not_usable(state, str(error)) from error
        yield


def _open_store(state: StateDirectory) -> SqliteStore:
    try:
        return SqliteStore(state.store)
    except StoreError as error:
        raise _not_usable(state, str(error)) from error


def _not_usable(state: StateDirectory, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the state directory {state.path} cannot be used: {why}; choose another one",
        reason="STATE_NOT_USABLE",
        metadata={"path": state.path},
    )


def _seconds(settings: ControllerSettings, field: str, default_s: float) -> float:
    value: float = getattr(settings, field).ToTimedelta().total_seconds()
    return value if settings.HasField(field) else default_s  # type: ignore[arg-type]  # the field's name varies
