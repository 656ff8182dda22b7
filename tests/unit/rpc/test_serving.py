"""How servers begin and end, and what their callers hear of errors."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator
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
from vmherd.rpc.serving import find_group, owned_socket, serving
from vmherd.rpc.status import CODES, from_rpc_error

pytestmark = pytest.mark.anyio

DEADLINE_S = 60.0
SERVICE = "vmherd.api.v1.ControllerService"


class Servicer(controller_pb2_grpc.ControllerServiceServicer):
    """Answers as the test wants, to the users that it wants."""

    def __init__(self, peers: Collection[int] | None = None) -> None:
        self.peers = peers
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


@pytest.fixture(params=[None, {os.geteuid()}], ids=["direct", "front"])
def servicer(request: pytest.FixtureRequest) -> Servicer:
    return Servicer(request.param)


@pytest.fixture
async def stub(path: Path) -> AsyncIterator[controller_pb2_grpc.ControllerServiceAsyncStub]:
    async with open_channel(path) as channel:
        yield controller_pb2_grpc.ControllerServiceStub(channel)


def served(servicer: Servicer, path: Path, group: int | None = None) -> Any:
    add = partial(controller_pb2_grpc.add_ControllerServiceServicer_to_server, servicer)
    return serving({SERVICE: add}, path, group=group, peers=servicer.peers)


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


async def test_the_group_may_connect_where_one_is_given(servicer: Servicer, path: Path) -> None:
    group = os.getgroups()[-1] if os.geteuid() else 12345
    async with served(servicer, path, group):
        assert (mode_of(path), os.stat(path).st_gid) == (0o660, group)


async def test_a_group_that_cannot_be_given_is_told_of(
    servicer: Servicer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(FailedPrecondition, match="to the group 12345: Operation not permitted") as caught:
        async with served(servicer, path, 12345):
            pass
    assert caught.value.reason == "GROUP_NOT_USABLE"
    assert list(path.parent.iterdir()) == []


async def test_a_socket_has_its_mode_and_group_before_its_name(
    servicer: Servicer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = Path.rename

    def look(made: Path, target: Path) -> Path:
        seen.append((mode_of(made.parent), mode_of(made), made.stat().st_gid, target))
        return rename(made, target)

    monkeypatch.setattr(Path, "rename", look)
    mask = os.umask(0)
    try:
        async with served(servicer, path, os.getegid()):
            assert seen == [(0o700, 0o660, os.getegid(), path)]
    finally:
        os.umask(mask)


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


async def test_a_killed_server_behind_a_front_leaves_nothing_that_matters(servicer: Servicer, path: Path) -> None:
    os.mkdir(f"{path}.d")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{path}.d/grpc")
    async with served(servicer, path):
        assert mode_of(Path(f"{path}.d")) == 0o700
    assert list(path.parent.iterdir()) == []


async def test_a_foreign_thing_in_the_place_of_the_directory_is_left_alone(servicer: Servicer, path: Path) -> None:
    os.symlink("precious", f"{path}.d")
    with pytest.raises(FailedPrecondition, match=r"cannot make the directory .*s\.d: File exists"):
        async with served(servicer, path):
            pass
    assert os.readlink(f"{path}.d") == "precious"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize("queue", [0, 10])
def test_a_server_that_knows_no_lock_is_left_alone(path: Path, kind: socket.SocketKind, queue: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as foreign, socket.socket(socket.AF_UNIX, kind) as caller:
        foreign.bind(str(path))
        if kind is not socket.SOCK_DGRAM:
            foreign.listen(queue)
            caller.connect(str(path))  # with a queue of 0 it is full now
        inode = path.stat().st_ino
        with pytest.raises(FailedPrecondition, match="another process serves") as caught, owned_socket(path):
            pass
        assert caught.value.reason == "SOCKET_IN_USE"
        assert path.stat().st_ino == inode


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("nowhere")
    with pytest.raises(FailedPrecondition, match="something else is there"), owned_socket(path):
        pass
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_is_too_long(path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="the kernel takes 107") as caught, owned_socket(path / ("x" * 107)):
        pass
    assert caught.value.reason == "SOCKET_PATH_TOO_LONG"


def test_a_group_is_found_by_its_name_or_number() -> None:
    assert find_group("root") == find_group("0") == 0
    assert find_group("4294967294") == 4294967294  # it need not have a name
    with pytest.raises(FailedPrecondition, match="there is no group 'no-such-group'") as caught:
        find_group("no-such-group")
    assert caught.value.reason == "GROUP_UNKNOWN"
