"""What can be done to the helper's socket: it serves on, keeps its size, and says whom it refused and why."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.qemu.attacked import CONTROLLER, ROOT, STRANGER, Attacked, attacked
from tests.integration.qemu.house import DEADLINE_S
from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.qemu.app import CALLS_MAX, REQUEST_MAX_BYTES
from vmherd.rpc.channel import OPTIONS
from vmherd.rpc.peers import CONNECTIONS_MAX, GREETING, SILENT_MAX

pytestmark = pytest.mark.anyio

needs_root = pytest.mark.skipif(not ROOT, reason="only root can be another user")

IDLE = 10_000
CALLS = 100_000
GROWTH_MAX_KIB = 32 * 1024

NOISE = bytes(range(256)) * 256

HOLDS_CONNECTIONS = """
import resource, socket, sys
path, wanted, words = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = []
for _ in range(min(wanted, hard - 50)):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(path)
    try:
        held[-1].sendall(words)
    except BrokenPipeError:
        pass
print(len(held), flush=True)
sys.stdin.read()
"""
"""Holds connections until its input ends."""

CONNECTS = """
import os, socket, sys
path, uid, gid, words = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4])
os.setgroups([])
os.setresgid(gid, gid, gid)
os.setresuid(uid, uid, uid)
try:
    it = socket.socket(socket.AF_UNIX)
    it.connect(path)
    it.sendall(words)
    print(len(it.recv(1)))
except OSError as error:
    print(type(error).__name__)
"""
"""Connects as another user, and says how many bytes of an answer it got, or the error."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for all tests here, so that they share one helper."""
    return "asyncio"


@pytest.fixture(scope="module")
async def site() -> AsyncIterator[Attacked]:
    async with attacked() as it:
        yield it


async def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        await asyncio.sleep(0.01)


async def asks(site: Attacked) -> None:
    """What the controller does, on a connection of its own: gRPC would share one with the house's channel."""
    options = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(f"unix:{site.house.listen}", options=options) as channel:
        stub = qemu_pb2_grpc.QemuServiceStub(channel)
        await stub.List(qemu_pb2.ListRequest(), wait_for_ready=True, timeout=DEADLINE_S)


def refusals(site: Attacked) -> list[tuple[int, str]]:
    """Who was refused and why."""
    lines = site.news()
    assert {(line["event"], line["level"]) for line in lines} <= {("caller refused", "warning")}
    return [(line["peer_uid"], line["why"]) for line in lines]


@contextlib.asynccontextmanager
async def holding(site: Attacked, connections: int, words: bytes = b"") -> AsyncIterator[int]:
    """A process that holds connections; gives how many."""
    command = (sys.executable, "-I", "-S", "-c", HOLDS_CONNECTIONS, str(site.house.listen), str(connections))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, words.hex(), stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(3 * DEADLINE_S):
            held = int(await process.stdout.readline())
        yield held
    finally:
        await process.communicate(b"")


async def settled(site: Attacked, descriptors: int) -> list[tuple[int, str]]:
    """Waits until the helper has no more descriptors than before, and gives whom it has refused until then."""
    await asks(site)  # who came before this has been accepted by now
    await eventually(lambda: site.descriptors() <= descriptors)
    return refusals(site)


async def test_idle_connections_starve_nobody(site: Attacked) -> None:
    before = site.descriptors()
    async with site.unchanged():
        async with holding(site, IDLE) as held:
            await asks(site)
            assert site.descriptors() < before + 2 * SILENT_MAX
            refused = refusals(site)
        refused += await settled(site, before)
    assert refused == [(os.geteuid(), f"{SILENT_MAX} others of this user have said nothing either")] * len(refused)
    assert len(refused) >= held - SILENT_MAX


async def test_connections_that_stop_after_their_greeting_are_counted(site: Attacked) -> None:
    """Who has the right to call may take all connections that its user has, and is the only one to lack one then."""
    before = site.descriptors()
    async with site.unchanged():
        refused: list[tuple[int, str]] = []

        def ten_refused() -> bool:
            refused.extend(refusals(site))
            return len(refused) >= 10

        async with holding(site, CONNECTIONS_MAX + 10, GREETING):
            await eventually(ten_refused)
        refused += await settled(site, before)
    assert refused == [(os.geteuid(), f"this user has {CONNECTIONS_MAX} connections")] * len(refused)


@pytest.mark.parametrize(
    "words",
    [b"GET / HTTP/1.1\r\nHost: vmherd\r\n\r\n", b"\x16\x03\x01\x02\x00", NOISE, b"\0" * 1000],
    ids=["HTTP/1.1", "TLS", "noise", "zeros"],
)
async def test_what_is_not_http_2_is_refused(site: Attacked, words: bytes) -> None:
    async with site.unchanged():
        assert await said(site, words) == b""
        assert refusals(site) == [(os.geteuid(), f"it does not speak HTTP/2: {words[: len(GREETING)]!r}")]
        await asks(site)


@pytest.mark.parametrize(
    "words",
    [
        NOISE,
        b"\xff" * 9 + b"\0" * 4096,
        b"\0\0\x04\x04\0\0\0\0\0oops",
        b"\0\0\0\x04\0\0\0\0\0\xff\xff\xff\x01\x04\0\0\0\x01",
    ],
    ids=["noise", "a large frame", "odd settings", "endless headers"],
)
async def test_what_is_http_2_in_its_first_words_alone_harms_nobody(site: Attacked, words: bytes) -> None:
    """It is gRPC that ends these connections."""
    async with site.unchanged():
        await said(site, GREETING + words)
        await asks(site)


async def said(site: Attacked, words: bytes) -> bytes:
    """What a caller hears that says this and no more."""
    loop = asyncio.get_running_loop()
    heard = b""
    with socket.socket(socket.AF_UNIX) as caller, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        caller.setblocking(False)
        async with asyncio.timeout(DEADLINE_S):
            await loop.sock_connect(caller, str(site.house.listen))
            await loop.sock_sendall(caller, words)
            caller.shutdown(socket.SHUT_WR)
            while more := await loop.sock_recv(caller, 1 << 16):
                heard += more
    return heard


async def test_requests_without_measure_are_refused(site: Attacked) -> None:
    machine = site.house.machine(kernel_boot=qemu_pb2.KernelBoot(command_line="x" * REQUEST_MAX_BYTES))
    async with site.unchanged():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await site.house.start(machine)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    site.forget(machine)


async def test_watches_without_number_are_refused(site: Attacked) -> None:
    """Each would take memory for as long as its caller likes."""
    watches: list[Any] = []

    async def refused() -> bool:
        watches.append(site.house.stub.Watch(qemu_pb2.WatchRequest(), timeout=3 * DEADLINE_S))
        try:
            await watches[-1].read()
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return False

    async with site.unchanged():
        refusals = [sum(await asyncio.gather(*(refused() for _ in range(64)))) for _ in range(CALLS_MAX // 64 + 1)]
        assert sum(refusals) == refusals[-1] == 64
        for watch in watches:
            watch.cancel()
        async with asyncio.timeout(DEADLINE_S):
            while await refused():
                pass
        watches[-1].cancel()


@pytest.mark.timeout(300)
async def test_calls_without_number(site: Attacked) -> None:
    """Each is answered or refused and logged, and the helper is as large afterwards as it was before."""
    list_, release = qemu_pb2.ListRequest(), qemu_pb2.ReleaseRequest(uid="../../etc")

    async def call(number: int) -> bool:
        if number % 10:
            await site.house.stub.List(list_)
            return False
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await site.house.stub.Release(release)
        return caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    await at_once(call, 5000)
    before_kib = site.resident_kib()
    site.news()
    async with site.unchanged():
        assert await at_once(call, CALLS) == CALLS / 10
    logged = [(line["event"], line["call"], line["uid"], line["reason"]) for line in site.news()]
    assert logged == [("refused", "Release", "../../etc", "INVALID_ARGUMENT")] * (CALLS // 10)
    assert site.resident_kib() < before_kib + GROWTH_MAX_KIB


async def at_once(call: Callable[[int], Awaitable[bool]], number: int) -> int:
    """Makes calls, a hundred at a time, and counts those that gave True."""
    numbers = iter(range(number))

    async def some() -> int:
        return sum([await call(number) for number in numbers])

    return sum(await asyncio.gather(*(some() for _ in range(100))))


async def connects(path: Path, uid: int, gid: int) -> str:
    command = (sys.executable, "-I", "-S", "-c", CONNECTS, str(path), str(uid), str(gid), GREETING.hex())
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    async with asyncio.timeout(DEADLINE_S):
        stdout, _ = await process.communicate()
    return stdout.decode().strip()


@needs_root
async def test_a_caller_of_another_user_is_refused(site: Attacked) -> None:
    """The file's mode keeps strangers out, and the kernel's word those who are in the group."""
    listen = site.house.listen
    async with site.unchanged():
        assert await connects(listen, STRANGER, STRANGER) == "PermissionError"
        assert refusals(site) == []
        assert await connects(listen, STRANGER, CONTROLLER) in {"0", "ConnectionResetError", "BrokenPipeError"}
        assert refusals(site) == [(STRANGER, "this user may not call")]
        assert await connects(listen, CONTROLLER, CONTROLLER) == "1"
        assert refusals(site) == []


@needs_root
async def test_nobody_gets_round_the_front(site: Attacked) -> None:
    behind = Path(f"{site.house.listen}.d") / "grpc"
    async with site.unchanged():
        assert await connects(behind, 0, 0) == "1"
        assert await connects(behind, CONTROLLER, CONTROLLER) == "PermissionError"
