"""How vmherd's gRPC servers are put together, started and ended."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vmherd.model.errors import FailedPrecondition
from vmherd.model.layout import SOCKET_PATH_MAX_BYTES
from vmherd.rpc.interceptors import ErrorsToStatus, TokenOnTcp

SHUTDOWN_GRACE_S = 0.5
SOCKET_MODE = 0o600
"""Who may connect may command; a group that also may comes with a uid for each machine."""

MESSAGE_MAX_BYTES = 32 * 1024 * 1024
"""Room for the largest request there is: a command with 16 MiB of standard input."""

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SIGHUP is what a terminal sends that is closed."""

OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    # Two servers on one TCP port would share its callers without a word.
    ("grpc.so_reuseport", 0),
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
            raise FailedPrecondition(
                f"another process serves {path}; end it first or choose another run directory", reason="SOCKET_IN_USE"
            )
        with contextlib.ExitStack() as stack:
            stack.callback(lock_path.unlink, missing_ok=True)
            if path.exists() and not path.is_socket():
                raise FailedPrecondition(
                    f"cannot make the socket {path}: something else is there; remove it or choose another path",
                    reason="SOCKET_NOT_WRITABLE",
                )
            stack.callback(path.unlink, missing_ok=True)
            yield


@contextlib.asynccontextmanager
async def _running(services: Services, address: str, *guards: grpc.aio.ServerInterceptor) -> AsyncIterator[int]:
    errors = ErrorsToStatus()
    server = grpc.aio.server(interceptors=(*guards, errors), options=OPTIONS)
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
async def serving(services: Services, socket: Path, *, tcp: str = "", token: str = "") -> AsyncIterator[int | None]:
    """Serves the services with health and reflection on a unix socket and, if asked, on TCP with a token.

    Yields the TCP port, None without one. When the context is left streams end at once, other calls within half a
    second, with UNAVAILABLE.

    Raises:
        FailedPrecondition: the socket or the address cannot be had.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(owned_socket(socket))
        await stack.enter_async_context(_running(services, f"unix:{socket}"))
        # Not by the umask, which is the whole process's: others make files meanwhile.
        os.chmod(socket, SOCKET_MODE)
        port = None
        if tcp:
            port = await stack.enter_async_context(_running(services, tcp, TokenOnTcp(token)))
        yield port


async def until_signalled() -> None:
    """Waits for a signal that asks for an orderly end. A second one ends the process at once."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in END_SIGNALS:
        loop.add_signal_handler(number, asked.set)
    try:
        await asked.wait()
    finally:
        for number in END_SIGNALS:
            loop.remove_signal_handler(number)
