"""How servers begin and end, and what their callers hear of errors."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from vmherd.api.v1 import controller_pb2, controller_pb2_grpc, instance_pb2
from vmherd.model import errors
from vmherd.model.errors import FailedPrecondition, FieldViolation, VmherdError
from vmherd.rpc.channel import open_channel
from vmherd.rpc.serving import owned_socket, serving
from vmherd.rpc.status import CODES, from_rpc_error

pytestmark = pytest.mark.anyio

DEADLINE_S = 5.0
SERVICE = "vmherd.api.v1.ControllerService"


class Servicer(controller_pb2_grpc.ControllerServiceServicer):
    """Answers as the test wants."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.let_go = asyncio.Event()
        self.begun = asyncio.Event()
        self.handlers = 0

    async def Info(self, request: controller_pb2.InfoRequest, context: Any) -> instance_pb2.Instance:  # noqa: N802
        if self.error:
            raise self.error
        self.begun.set()
        self.handlers += 1
        try:
            await self.let_go.wait()
        finally:
            self.handlers -= 1
        return instance_pb2.Instance(name=request.name)

    async def Watch(  # noqa: N802
        self, request: controller_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[controller_pb2.WatchResponse]:
        yield controller_pb2.WatchResponse(revision=1)
        if self.error:
            raise self.error
        self.handlers += 1
        try:
            await self.let_go.wait()
        finally:
            self.handlers -= 1


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as directory:
        yield Path(directory) / "s"


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def stub(path: Path) -> AsyncIterator[controller_pb2_grpc.ControllerServiceAsyncStub]:
    async with open_channel(path) as channel:
        yield controller_pb2_grpc.ControllerServiceStub(channel)


def served(servicer: Servicer, path: Path) -> Any:
    add = partial(controller_pb2_grpc.add_ControllerServiceServicer_to_server, servicer)
    return serving({SERVICE: add}, path)


async def error_of(call: Any) -> VmherdError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(DEADLINE_S):
            await call
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("text", ["a", "ä", "\N{FIRE}", "\n"])
@pytest.mark.parametrize("kind", list(CODES))
async def test_no_error_is_too_large_for_its_headers(
    servicer: Servicer, path: Path, stub: Any, kind: type[VmherdError], text: str
) -> None:
    long = text * 100_000
    async with served(servicer, path):
        servicer.error = kind(long, reason="LONG", metadata={"name": long, "stderr_tail": long})
        error = await error_of(stub.Info(controller_pb2.InfoRequest()))
        assert (type(error), error.reason) == (kind, "LONG")
        servicer.error = errors.InvalidArgument.of([FieldViolation(long, long)] * 100)
        error = await error_of(stub.Info(controller_pb2.InfoRequest()))
        assert (type(error), error.reason) == (errors.InvalidArgument, "INVALID_ARGUMENT")


async def test_the_umask_is_left_alone(servicer: Servicer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's, and others make files and directories while a server starts."""
    monkeypatch.setattr(os, "umask", lambda _mask: pytest.fail("the umask was changed"))
    async with served(servicer, path):
        assert mode_of(path) == 0o600


async def test_an_unexpected_exception_reaches_the_log_and_not_the_caller(
    servicer: Servicer, path: Path, stub: Any
) -> None:
    async with served(servicer, path):
        servicer.error = RuntimeError("the secret is 42")
        with capture_logs() as logs:
            first = await error_of(stub.Info(controller_pb2.InfoRequest()))
            watch = stub.Watch(controller_pb2.WatchRequest())
            await watch.read()
            second = await error_of(watch.read())
    for error, log in zip((first, second), logs, strict=True):
        assert isinstance(error, errors.InternalError)
        assert "secret" not in str(error)
        assert (log["incident_id"], log["exc_info"]) == (error.metadata["incident_id"], servicer.error)


async def test_at_the_end_streams_are_told_and_calls_may_finish(servicer: Servicer, path: Path, stub: Any) -> None:
    async with served(servicer, path):
        watches = [stub.Watch(controller_pb2.WatchRequest()) for _ in range(3)]
        for watch in watches:
            await watch.read()
        info = asyncio.ensure_future(stub.Info(controller_pb2.InfoRequest(name="web")))
        await servicer.begun.wait()
        asyncio.get_running_loop().call_soon(servicer.let_go.set)
    assert (await info).name == "web"
    for watch in watches:
        error = await error_of(watch.read())
        assert (type(error), error.reason) == (errors.Unavailable, "SHUTTING_DOWN")
    assert servicer.handlers == 0


async def test_at_the_end_no_call_is_waited_for_for_long(servicer: Servicer, path: Path, stub: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        async with served(servicer, path):
            info = asyncio.ensure_future(stub.Info(controller_pb2.InfoRequest()))
            await servicer.begun.wait()
        assert isinstance(await error_of(info), errors.Unavailable)
    assert servicer.handlers == 0


async def test_a_stream_that_its_client_left_ends_its_handler(servicer: Servicer, path: Path, stub: Any) -> None:
    async with served(servicer, path):
        watch = stub.Watch(controller_pb2.WatchRequest())
        await watch.read()
        watch.cancel()
        async with asyncio.timeout(DEADLINE_S):
            while servicer.handlers:  # noqa: ASYNC110  the server has no event for it
                await asyncio.sleep(0)


async def test_two_servers_cannot_have_one_socket(servicer: Servicer, path: Path, stub: Any) -> None:
    async with served(servicer, path):
        with pytest.raises(FailedPrecondition, match="another process serves") as caught:
            async with served(Servicer(), path):
                pass
        assert caught.value.reason == "SOCKET_IN_USE"
        servicer.let_go.set()
        assert (await stub.Info(controller_pb2.InfoRequest(name="web"))).name == "web"
    assert list(path.parent.iterdir()) == []


async def test_a_socket_that_a_killed_server_left_is_taken_over(servicer: Servicer, path: Path, stub: Any) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    servicer.let_go.set()
    async with served(servicer, path):
        assert (await stub.Info(controller_pb2.InfoRequest(name="web"))).name == "web"
        assert mode_of(path) == 0o600
    assert list(path.parent.iterdir()) == []


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_socket_is_left_alone(path: Path, kind: str) -> None:
    path.mkdir() if kind == "directory" else path.write_text("precious")
    with pytest.raises(FailedPrecondition, match="something else is there"), owned_socket(path):
        pass
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_is_too_long(path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="the kernel takes 107") as caught, owned_socket(path / ("x" * 107)):
        pass
    assert caught.value.reason == "SOCKET_PATH_TOO_LONG"
