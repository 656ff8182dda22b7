"""How vmherd's gRPC servers are put together, started and ended."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import os
import shutil
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vmherd.model.errors import FailedPrecondition
from vmherd.model.layout import SOCKET_PATH_MAX_BYTES
from vmherd.rpc.interceptors import ErrorsToStatus, TokenOnTcp
from vmherd.rpc.notify import ServiceManager
from vmherd.rpc.peers import front

SHUTDOWN_GRACE_S = 0.5
SOCKET_MODE = 0o600
GROUP_SOCKET_MODE = 0o660
"""Who may connect may command."""

REQUEST_MAX_BYTES = 32 * 1024 * 1024
"""Room for the largest request there is: a command with 16 MiB of standard input."""

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SIGHUP is what a terminal sends that is closed."""

OPTIONS = (
    # Two servers on one TCP port would share its callers without a word.
    ("grpc.so_reuseport", 0),
    # How long who connects may take to speak HTTP/2.
    ("grpc.server_handshake_timeout_ms", 10_000),
)

Services = Mapping[str, Callable[[grpc.aio.Server], None]]
"""The full name of each service, and what adds it to a server."""


def check_socket_path(path: Path) -> None:
    """Refuses a path that the kernel has no room for; gRPC's own error would not say why.

    Raises:
        FailedPrecondition: the path is too long.
    """
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_MAX_BYTES:
        raise FailedPrecondition(
            f"the socket path {path} has {length} bytes and the kernel takes {SOCKET_PATH_MAX_BYTES}; "
            "choose a shorter run directory",
            reason="SOCKET_PATH_TOO_LONG",
        )


def find_group(name: str) -> int:
    """The gid of a group that is given by its name or number.

    Raises:
        FailedPrecondition: there is no such group.
    """
    try:
        return int(name) if name.isascii() and name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise FailedPrecondition(
            f"there is no group {name!r} on this host; `groupadd --system {name}` makes it", reason="GROUP_UNKNOWN"
        ) from error


@contextlib.contextmanager
def owned_socket(path: Path) -> Iterator[None]:
    """Owns a unix socket's path: a second server there would take its callers, and each would remove the other's file.

    Raises:
        FailedPrecondition: another process serves this path, something else is there, or it cannot be made.
    """
    check_socket_path(path)
    lock_path = Path(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise FailedPrecondition(
            f"cannot make the socket {path}: {error.strerror}; choose a directory that this user may write to",
            reason="SOCKET_NOT_WRITABLE",
        ) from error
    with os.fdopen(lock):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(lock), lock_path.stat())  # or its last owner removed it just now
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise _in_use(path)
        with contextlib.ExitStack() as stack:
            stack.callback(lock_path.unlink, missing_ok=True)
            if os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode):
                raise FailedPrecondition(
                    f"cannot make the socket {path}: something else is there; remove it or choose another path",
                    reason="SOCKET_NOT_WRITABLE",
                )
            if _answers(path):
                raise _in_use(path)
            stack.callback(path.unlink, missing_ok=True)
            yield


def _answers(path: Path) -> bool:
    """Whether somebody listens on a socket, who need not know of our lock."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # its queue is full, it is of another kind, or another user's: it is there
    return True


def _in_use(path: Path) -> FailedPrecondition:
    return FailedPrecondition(
        f"another process serves {path}; end it first or choose another run directory", reason="SOCKET_IN_USE"
    )


@contextlib.contextmanager
def _private_directory(path: Path) -> Iterator[Path]:
    """A directory that nobody else may enter: sockets come into being there, before they have their mode and name.

    Not by the umask, which is the whole process's: others make files meanwhile.
    """
    shutil.rmtree(path, ignore_errors=True)  # of a server that was killed
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise FailedPrecondition(
            f"cannot make the directory {path}: {error.strerror}; remove what is there or choose another path",
            reason="SOCKET_NOT_WRITABLE",
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _publish(made: Path, path: Path, group: int | None) -> None:
    """Gives a socket its group, its mode, and at last its name."""
    try:
        if group is not None:
            os.chown(made, -1, group)
    except OSError as error:
        raise FailedPrecondition(
            f"cannot give the socket {path} to the group {group}: {error.strerror}; is this user in the group?",
            reason="GROUP_NOT_USABLE",
        ) from error
    made.chmod(SOCKET_MODE if group is None else GROUP_SOCKET_MODE)
    made.rename(path)


@contextlib.asynccontextmanager
async def _running(
    services: Services,
    address: str,
    *guards: grpc.aio.ServerInterceptor,
    request_max_bytes: int,
    calls_max: int | None,
) -> AsyncIterator[int]:
    errors = ErrorsToStatus()
    options = (*OPTIONS, ("grpc.max_receive_message_length", request_max_bytes))
    server = grpc.aio.server(interceptors=(*guards, errors), options=options, maximum_concurrent_rpcs=calls_max)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name, add in services.items():
        add(server)
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise FailedPrecondition(
            f"cannot listen on {address}: the address is taken or not this host's; choose another",
            reason="ADDRESS_NOT_AVAILABLE",
        ) from error
    await server.start()
    try:
        yield port
    finally:
        await checks.enter_graceful_shutdown()
        errors.end_streams()
        await server.stop(SHUTDOWN_GRACE_S)
        await errors.wait_ended()


@contextlib.asynccontextmanager
async def serving(
    services: Services,
    socket: Path,
    *,
    group: int | None = None,
    peers: Collection[int] | None = None,
    request_max_bytes: int = REQUEST_MAX_BYTES,
    calls_max: int | None = None,
    tcp: str = "",
    token: str = "",
) -> AsyncIterator[int | None]:
    """Serves the services with health and reflection on a unix socket and, if asked, on TCP with a token.

    Who may connect to the socket is its owner and, where one is given, its group (a gid). Where `peers` are given,
    callers are these users (uids) alone. Where there is a `calls_max`, more calls at the same time are answered with
    RESOURCE_EXHAUSTED.

    Yields the TCP port, None without one. When the context is left streams end at once, other calls within half a
    second, with UNAVAILABLE.

    Raises:
        FailedPrecondition: the socket or the address cannot be had.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(owned_socket(socket))
        private = stack.enter_context(_private_directory(Path(f"{socket}.d")))
        made = server = private / "grpc"
        check_socket_path(private / "front")
        if peers is not None:
            made = private / "front"
            await stack.enter_async_context(front(made, server, peers))
        running = partial(_running, services, request_max_bytes=request_max_bytes, calls_max=calls_max)
        await stack.enter_async_context(running(f"unix:{server}"))
        _publish(made, socket, group)
        port = None
        if tcp:
            port = await stack.enter_async_context(running(tcp, TokenOnTcp(token)))
        yield port


async def serve_until_signalled(status: str) -> None:
    """Tells the service manager that this process serves, and by a status how, until a signal asks for its end."""
    manager = ServiceManager.taken_from(os.environ)
    with _end_asked_for() as asked:
        await manager.tell(READY=1, STATUS=status)
        async with manager.told_of_life():
            await asked.wait()
    await manager.tell(STOPPING=1, STATUS="ending")


async def until_signalled() -> None:
    """Waits for a signal that asks for an orderly end. A second one ends the process at once."""
    with _end_asked_for() as asked:
        await asked.wait()


@contextlib.contextmanager
def _end_asked_for() -> Iterator[asyncio.Event]:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in END_SIGNALS:
        loop.add_signal_handler(number, asked.set)
    try:
        yield asked
    finally:
        for number in END_SIGNALS:
            loop.remove_signal_handler(number)
