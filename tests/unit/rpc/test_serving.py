"""Servers as they are put together, over real channels."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.model.errors import (
    FailedPrecondition,
    FieldViolation,
    InternalError,
    InvalidArgument,
    Unauthenticated,
    VmherdError,
)
from vmherd.rpc.channel import open_channel
from vmherd.rpc.serving import Services, owned_socket, serving
from vmherd.rpc.status import from_rpc_error

pytestmark = pytest.mark.anyio

SERVICE = "vmherd.api.qemu.v1.QemuService"
TIMEOUT_S = 10


class Served(qemu_pb2_grpc.QemuServiceServicer):
    """Raises what it was given, in an answer and in a stream after one message; waits without an end otherwise."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.stream_ended = asyncio.Event()

    async def List(self, request: Any, context: Any) -> qemu_pb2.ListResponse:  # noqa: N802
        if self.error is not None:
            raise self.error
        return qemu_pb2.ListResponse(processes=[qemu_pb2.Process(name="one")])

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[qemu_pb2.WatchResponse]:  # noqa: N802
        try:
            yield qemu_pb2.WatchResponse(synced=True)
            if self.error is not None:
                raise self.error
            await asyncio.get_running_loop().create_future()
        finally:
            self.stream_ended.set()


def services(served: Served) -> Services:
    return {SERVICE: partial(qemu_pb2_grpc.add_QemuServiceServicer_to_server, served)}


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as path:  # a socket's path holds 107 bytes
        yield Path(path)


@contextlib.asynccontextmanager
async def channel_to(path: Path) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(path) as channel:
        yield channel


async def list_on(channel: grpc.aio.Channel, **options: Any) -> qemu_pb2.ListResponse:
    stub: Any = qemu_pb2_grpc.QemuServiceStub(channel)
    response: qemu_pb2.ListResponse = await stub.List(qemu_pb2.ListRequest(), timeout=TIMEOUT_S, **options)
    return response


async def all_of(stream: AsyncIterable[Any]) -> list[Any]:
    return [response async for response in stream]


async def error_of(channel: grpc.aio.Channel, **options: Any) -> VmherdError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await list_on(channel, **options)
    return from_rpc_error(caught.value)


async def test_a_socket_is_served_for_its_group_and_gone_afterwards(directory: Path) -> None:
    path = directory / "made" / "x.sock"
    async with serving(services(Served()), path) as port, channel_to(path) as channel:
        assert port is None
        assert [process.name for process in (await list_on(channel)).processes] == ["one"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert sorted(os.listdir(path.parent)) == ["x.sock", "x.sock.lock"]
    assert os.listdir(path.parent) == []


async def test_the_umask_is_as_before(directory: Path) -> None:
    before = os.umask(0o022)
    try:
        async with serving(services(Served()), directory / "x.sock"):
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


async def test_health_and_reflection_are_served(directory: Path) -> None:
    path = directory / "x.sock"
    async with serving(services(Served()), path), channel_to(path) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            checked = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert checked.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        answers = [answer async for answer in reflection.ServerReflectionInfo(iter(asked), timeout=TIMEOUT_S)]
        listed = {service.name for service in answers[0].list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= listed


async def test_a_second_server_is_refused_and_the_first_goes_on(directory: Path) -> None:
    path = directory / "x.sock"
    async with serving(services(Served()), path), channel_to(path) as channel:
        with pytest.raises(FailedPrecondition, match="another process serves") as caught:
            async with serving(services(Served()), path):
                pass
        assert caught.value.reason == "SOCKET_IN_USE"
        await list_on(channel)


async def test_what_a_killed_server_left_is_taken_over(directory: Path) -> None:
    path = directory / "x.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    Path(f"{path}.lock").touch()  # noqa: ASYNC240
    async with serving(services(Served()), path), channel_to(path) as channel:
        await list_on(channel)


def test_a_path_that_is_too_long_is_refused(directory: Path) -> None:
    length = 107 - len(str(directory)) - 1
    with owned_socket(directory / ("x" * length)):
        pass
    with pytest.raises(FailedPrecondition, match="has 108 bytes and the kernel takes 107") as caught:
        owned_socket(directory / ("x" * (length + 1))).__enter__()
    assert caught.value.reason == "SOCKET_PATH_TOO_LONG"


def test_bytes_count_and_not_characters(directory: Path) -> None:
    with pytest.raises(FailedPrecondition, match="the kernel takes 107"):
        owned_socket(directory / ("\u00e4" * 60)).__enter__()


def test_a_directory_that_cannot_be_made_is_refused(directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(FailedPrecondition, match=r"Not a directory|File exists") as caught:
        owned_socket(directory / "file" / "x.sock").__enter__()
    assert caught.value.reason == "SOCKET_NOT_WRITABLE"


def test_a_file_in_place_of_the_socket_is_left_alone(directory: Path) -> None:
    (directory / "x.sock").write_text("mine")
    with pytest.raises(FailedPrecondition, match="something else is there") as caught:
        owned_socket(directory / "x.sock").__enter__()
    assert caught.value.reason == "SOCKET_NOT_WRITABLE"
    assert os.listdir(directory) == ["x.sock"]
    assert (directory / "x.sock").read_text() == "mine"


def test_a_link_in_place_of_the_lock_is_not_followed(directory: Path) -> None:
    (directory / "x.sock.lock").symlink_to(directory / "target")
    with pytest.raises(FailedPrecondition) as caught:
        owned_socket(directory / "x.sock").__enter__()
    assert caught.value.reason == "SOCKET_NOT_WRITABLE"
    assert not (directory / "target").exists()


async def test_on_tcp_every_call_needs_the_token(directory: Path) -> None:
    path = directory / "x.sock"
    async with (
        serving(services(Served()), path, tcp="127.0.0.1:0", token="secret") as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        channel_to(path) as local,
    ):
        await list_on(local)
        await list_on(channel, metadata=(("authorization", "Bearer secret"),))
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "secret"),)):
            error = await error_of(channel, metadata=metadata)
            assert isinstance(error, Unauthenticated)
            assert error.reason == "TOKEN_NEEDED"
        stub: Any = qemu_pb2_grpc.QemuServiceStub(channel)
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        for stream in (
            stub.Watch(qemu_pb2.WatchRequest(), timeout=TIMEOUT_S),
            reflection.ServerReflectionInfo(iter(asked), timeout=TIMEOUT_S),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(stream))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_taken_port_is_refused_and_the_socket_is_gone(directory: Path) -> None:
    path = directory / "x.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(FailedPrecondition, match=address) as caught:
            async with serving(services(Served()), path, tcp=address, token="secret"):
                pass
    assert caught.value.reason == "ADDRESS_NOT_AVAILABLE"
    assert os.listdir(directory) == []


ERROR = InvalidArgument(
    "name: must be \u00e4 name",
    reason="WRONG",
    metadata={"name": "w\u00f6rld"},
    violations=[FieldViolation("name", "must be \u00e4 name")],
)


async def test_an_error_arrives_as_it_was_raised(directory: Path) -> None:
    path = directory / "x.sock"
    async with serving(services(Served(ERROR)), path), channel_to(path) as channel:
        error = await error_of(channel)
        assert isinstance(error, InvalidArgument)
        assert vars(error) == vars(ERROR)


async def test_an_error_ends_a_stream_after_what_came_before(directory: Path) -> None:
    path = directory / "x.sock"
    served = Served(ERROR)
    async with serving(services(served), path), channel_to(path) as channel:
        stub: Any = qemu_pb2_grpc.QemuServiceStub(channel)
        stream = aiter(stub.Watch(qemu_pb2.WatchRequest(), timeout=TIMEOUT_S))
        assert (await anext(stream)).synced
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(stream)
        assert vars(from_rpc_error(caught.value)) == vars(ERROR)
        assert served.stream_ended.is_set()


@pytest.mark.parametrize("method", ["List", "Watch"])
async def test_an_unexpected_exception_shows_nothing_of_its_text(
    directory: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory / "x.sock"
    async with serving(services(Served(RuntimeError("the secret"))), path), channel_to(path) as channel:
        stub: Any = qemu_pb2_grpc.QemuServiceStub(channel)
        calls = {
            "List": lambda: list_on(channel),
            "Watch": lambda: all_of(stub.Watch(qemu_pb2.WatchRequest(), timeout=TIMEOUT_S)),
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls[method]()
    error = from_rpc_error(caught.value)
    assert isinstance(error, InternalError)
    assert "secret" not in str(caught.value)
    logged = capsys.readouterr().out
    assert "the secret" in logged
    assert error.metadata["incident_id"] in logged
    assert error.metadata["incident_id"] in error.message


async def test_a_long_error_still_arrives(directory: Path) -> None:
    """A caller's own long value comes back in errors, and errors travel in headers, which are short."""
    path = directory / "x.sock"
    long = InvalidArgument.of([FieldViolation("path", "is " + "\u00e4" * 100_000)])
    async with serving(services(Served(long)), path), channel_to(path) as channel:
        error = await error_of(channel)
        assert isinstance(error, InvalidArgument)
        assert error.message.startswith("path: is \u00e4")
        assert [violation.field for violation in error.violations] == ["path"]


async def test_leaving_ends_open_streams_in_time(directory: Path) -> None:
    path = directory / "x.sock"
    served = Served()
    async with channel_to(path) as channel:
        async with serving(services(served), path):
            stub: Any = qemu_pb2_grpc.QemuServiceStub(channel)
            stream = aiter(stub.Watch(qemu_pb2.WatchRequest(), timeout=TIMEOUT_S))
            assert (await anext(stream)).synced
            assert not served.stream_ended.is_set()
            left_s = time.monotonic()
        assert time.monotonic() - left_s < 2
        await asyncio.wait_for(served.stream_ended.wait(), TIMEOUT_S)
        with pytest.raises(grpc.aio.AioRpcError):
            await anext(stream)


async def test_a_caller_who_cancels_ends_its_stream(directory: Path) -> None:
    path = directory / "x.sock"
    served = Served()
    async with serving(services(served), path), channel_to(path) as channel:
        stub: Any = qemu_pb2_grpc.QemuServiceStub(channel)
        call = stub.Watch(qemu_pb2.WatchRequest(), timeout=TIMEOUT_S)
        await anext(aiter(call))
        call.cancel()
        await asyncio.wait_for(served.stream_ended.wait(), TIMEOUT_S)


async def test_a_channel_finds_a_server_that_was_started_again(directory: Path) -> None:
    path = directory / "x.sock"
    async with channel_to(path) as channel:
        for _ in range(2):
            async with serving(services(Served()), path):
                await list_on(channel, wait_for_ready=True)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await list_on(channel)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_ask_for_an_orderly_end(number: signal.Signals) -> None:
    script = (
        "import asyncio, vmherd.rpc.serving as s\n"
        "async def main():\n"
        "    task = asyncio.create_task(s.until_signalled())\n"
        "    await asyncio.sleep(0)\n"
        "    print('ready', flush=True)\n"
        "    await task\n"
        "    print('ended', flush=True)\n"
        "asyncio.run(main())\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert (output, process.returncode) == (b"ended\n", 0)
