"""How a gateway starts, waits for its controller, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import structlog.testing
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer, add_HealthServicer_to_server

from tests.integration.gateway import raw
from tests.integration.gateway.conftest import DEADLINE_S
from tests.integration.gateway.peer import Peer
from vmherd.api.settings.v1.settings_pb2 import GatewaySettings
from vmherd.api.v1.controller_pb2 import WatchResponse
from vmherd.api.v1.instance_pb2 import Instance
from vmherd.gateway import app, routes, upstream
from vmherd.gateway.app import serving
from vmherd.model.errors import FailedPrecondition, InvalidArgument
from vmherd.rpc.serving import serving as rpc_serving

pytestmark = pytest.mark.anyio

SHUTDOWN_S = 20.0
"""The gateway's own limit is a second; what it must not wait for lasts longer than this."""


def settings_of(short_dir: Path, **changes: Any) -> GatewaySettings:
    """Settings of a gateway on a free port that asks for no token, changed as a test needs it."""
    usual = {"listen": "127.0.0.1:0", "controller": str(short_dir / "c.sock"), "no_token": True}
    return GatewaySettings(**usual | changes)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_the_address_is_written_and_removed(short_dir: Path) -> None:
    file = short_dir / "address"
    tasks = asyncio.all_tasks()
    async with serving(settings_of(short_dir), address_file=file) as address, httpx.AsyncClient() as http:
        assert file.read_text() == f"{address}\n"
        assert (await http.get(f"http://{address}/healthz")).json() == {"status": "SERVING"}
    assert names_in(short_dir) == []
    assert asyncio.all_tasks() == tasks
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address.split(":"))


async def test_signals_are_left_to_the_caller(short_dir: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    async with serving(settings_of(short_dir)) as address, httpx.AsyncClient() as http:
        assert (await http.get(f"http://{address}/healthz")).status_code == 200
        assert [signal.getsignal(number) for number in numbers] == before


async def test_ipv6(short_dir: Path) -> None:
    async with serving(settings_of(short_dir, listen="[::1]:0")) as address, httpx.AsyncClient() as http:
        assert address.startswith("[::1]:")
        assert (await http.get(f"http://{address}/healthz")).status_code == 200


async def test_an_address_that_is_taken(short_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(FailedPrecondition, match=rf"cannot listen on {listen}: Address already in use") as caught:
            async with serving(settings_of(short_dir, listen=listen), address_file=short_dir / "address"):
                pass
    assert caught.value.reason == "ADDRESS_NOT_AVAILABLE"
    assert names_in(short_dir) == []


async def test_an_address_that_is_not_of_this_host(short_dir: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        async with serving(settings_of(short_dir, listen="192.0.2.1:0")):
            pass
    assert caught.value.reason == "ADDRESS_NOT_AVAILABLE"


async def test_a_name_that_is_no_host_s(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)  # a real search may take long
    with pytest.raises(FailedPrecondition) as caught:
        async with serving(settings_of(short_dir, listen="no-such-host.invalid:0")):
            pass
    assert caught.value.reason == "ADDRESS_NOT_AVAILABLE"


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"listen": ""}, ["listen"]),
        ({"listen": "127.0.0.1"}, ["listen"]),
        ({"listen": ":8080"}, ["listen"]),
        ({"listen": "127.0.0.1:http"}, ["listen"]),
        ({"listen": "127.0.0.1:65536"}, ["listen"]),
        ({"listen": "127.0.0.1:80/path"}, ["listen"]),
        ({"listen": "http://127.0.0.1:80"}, ["listen"]),
        ({"controller": "", "no_token": False}, ["controller", "token_file"]),
    ],
)
async def test_wrong_settings(short_dir: Path, changes: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        async with serving(settings_of(short_dir, **changes)):
            pass
    assert [violation.field for violation in caught.value.violations] == fields


async def test_a_socket_path_that_is_too_long(short_dir: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        async with serving(settings_of(short_dir, controller=str(short_dir / ("x" * 108)))):
            pass
    assert caught.value.reason == "SOCKET_PATH_TOO_LONG"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "TOKEN_NOT_READABLE"),
        (b"", "TOKEN_NOT_USABLE"),
        (b"\n", "TOKEN_NOT_USABLE"),
        (b"two words", "TOKEN_NOT_USABLE"),
        (b"two\nlines", "TOKEN_NOT_USABLE"),
        (b"secr\xc3\xa9t", "TOKEN_NOT_USABLE"),
    ],
)
async def test_a_token_file_without_a_token(short_dir: Path, content: bytes | None, reason: str) -> None:
    file = short_dir / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FailedPrecondition, match=str(file)) as caught:
        async with serving(settings_of(short_dir, no_token=False, token_file=str(file))):
            pass
    assert caught.value.reason == reason
    assert "secr" not in caught.value.message


async def test_an_address_file_that_cannot_be_written(short_dir: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        async with serving(settings_of(short_dir), address_file=short_dir / "missing" / "address"):
            pass
    assert caught.value.reason == "ADDRESS_FILE_NOT_WRITABLE"


async def test_a_controller_that_comes_and_goes(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECTION_CHECK_INTERVAL_S", 0.01)
    peer = Peer()
    peer.answers["Info"] = Instance(name="web")
    peer.answers["Watch"] = peer.streaming(WatchResponse(), hang=True)
    with structlog.testing.capture_logs() as logs:
        async with serving(settings_of(short_dir)) as address, httpx.AsyncClient(base_url=f"http://{address}") as http:
            await logged(http, logs, "waiting for the controller")
            for path in ("/v1/instances/web", "/v1/watch", "/readyz"):
                response = await http.get(path)
                value = response.json()
                assert (response.status_code, response.headers["retry-after"]) == (503, "1")
                assert value["details"][0]["reason"] == "CONTROLLER_UNREACHABLE"
                assert str(short_dir / "c.sock") in value["message"]
                assert "vmherd controller" in value["message"]
            assert (await http.get("/healthz")).status_code == 200

            async with rpc_serving(peer.services, short_dir / "c.sock"):
                await answers(http, "/v1/instances/web", 200)
                await answers(http, "/readyz", 200)
                await logged(http, logs, "controller reached")
                stream = asyncio.create_task(http.get("/v1/watch"))
                async with asyncio.timeout(DEADLINE_S):
                    await peer.began.wait()
            async with asyncio.timeout(DEADLINE_S):
                assert set(json.loads((await stream).text.splitlines()[-1])) == {"error"}
            await answers(http, "/readyz", 503)
            await logged(http, logs, "waiting for the controller")

            async with rpc_serving(peer.services, short_dir / "c.sock"):
                await answers(http, "/v1/instances/web", 200)
                await logged(http, logs, "controller reached")


async def logged(http: httpx.AsyncClient, logs: list[Any], event: str) -> None:
    """Waits until this event, and nothing else of the connection, was logged, and forgets it."""
    async with asyncio.timeout(DEADLINE_S):
        while not (events := [log["event"] for log in logs if "socket" in log]):
            await http.get("/healthz")
    assert events == [event]
    logs.clear()


async def answers(http: httpx.AsyncClient, path: str, code: int) -> None:
    """Waits until a path answers with this code."""
    async with asyncio.timeout(DEADLINE_S):
        while (await http.get(path)).status_code != code:
            pass


class Health(HealthServicer):
    """A health service that never answers, or answers with what it was made with."""

    def __init__(self, status: HealthCheckResponse.ServingStatus.ValueType | None) -> None:
        self._status = status

    async def Check(self, _request: Any, _context: Any) -> HealthCheckResponse:  # noqa: N802
        if self._status is None:
            await asyncio.Event().wait()
        return HealthCheckResponse(status=self._status)


@pytest.mark.parametrize(
    ("status", "timeout_s", "reason", "message"),
    [
        (HealthCheckResponse.NOT_SERVING, DEADLINE_S, "CONTROLLER_NOT_READY", "it is NOT_SERVING"),
        (None, 0.5, "CONTROLLER_UNRESPONSIVE", "did not answer within 0.5 s"),
    ],
)
async def test_a_controller_that_is_not_ready(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch, status: Any, timeout_s: float, reason: str, message: str
) -> None:
    monkeypatch.setattr(upstream, "READY_TIMEOUT_S", timeout_s)
    server = grpc.aio.server()
    add_HealthServicer_to_server(Health(status), server)
    server.add_insecure_port(f"unix:{short_dir / 'c.sock'}")
    await server.start()
    async with serving(settings_of(short_dir)) as address, httpx.AsyncClient() as http:
        response = await http.get(f"http://{address}/readyz")
        assert (await http.get(f"http://{address}/healthz")).status_code == 200
    await server.stop(None)
    assert response.status_code == 503
    assert response.json()["details"][0]["reason"] == reason
    assert message in response.json()["message"]


async def test_shutdown_ends_streams_and_calls(short_dir: Path) -> None:
    peer = Peer()
    peer.answers["Watch"] = peer.streaming(WatchResponse(), hang=True)
    peer.answers["Info"] = peer.hang
    async with rpc_serving(peer.services, short_dir / "c.sock"), httpx.AsyncClient() as http:
        async with serving(settings_of(short_dir)) as address:
            stream = asyncio.create_task(http.get(f"http://{address}/v1/watch"))
            async with asyncio.timeout(DEADLINE_S):
                await peer.began.wait()
                peer.began.clear()
                call = asyncio.create_task(http.get(f"http://{address}/v1/instances/web"))
                await peer.began.wait()
            began = time.monotonic()
        assert time.monotonic() - began < SHUTDOWN_S
        async with asyncio.timeout(DEADLINE_S):
            last = json.loads((await stream).text.splitlines()[-1])["error"]
            unanswered = await call
            await peer.was_cancelled.wait()
    assert last["details"][0]["reason"] == "GATEWAY_SHUTTING_DOWN"
    assert (unanswered.status_code, unanswered.json()["details"]) == (503, last["details"])


async def test_shutdown_lets_a_short_call_finish(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "CALL_GRACE_S", DEADLINE_S)
    monkeypatch.setattr(app, "SHUTDOWN_TIMEOUT_S", DEADLINE_S)
    peer = Peer()
    go_on = asyncio.Event()

    async def answer(_request: Any, _context: Any) -> Instance:
        peer.began.set()
        await go_on.wait()
        return Instance(name="web")

    peer.answers["Info"] = answer
    async with rpc_serving(peer.services, short_dir / "c.sock"), httpx.AsyncClient() as http:
        async with serving(settings_of(short_dir)) as address:
            call = asyncio.create_task(http.get(f"http://{address}/v1/instances/web"))
            async with asyncio.timeout(DEADLINE_S):
                await peer.began.wait()
            asyncio.get_running_loop().call_later(0.2, go_on.set)
        async with asyncio.timeout(DEADLINE_S):
            assert (await call).status_code == 200


async def test_shutdown_does_not_wait_for_a_client_that_reads_nothing(short_dir: Path) -> None:
    peer = Peer()
    more_than_any_buffer_holds = WatchResponse(instance=Instance(name="x" * 2**25))
    peer.answers["Watch"] = peer.streaming(more_than_any_buffer_holds, hang=True)
    async with rpc_serving(peer.services, short_dir / "c.sock"), contextlib.AsyncExitStack() as stack:
        async with serving(settings_of(short_dir)) as address:
            reader, writer = await stack.enter_async_context(raw.connected(address))
            writer.write(raw.head("GET", "/v1/watch", address))
            async with asyncio.timeout(DEADLINE_S):
                await reader.readuntil(b'{"result":')
            writer.transport.pause_reading()
            began = time.monotonic()
        assert time.monotonic() - began < SHUTDOWN_S
        writer.transport.abort()


PROGRAM = """
import asyncio, sys
from pathlib import Path
from vmherd.api.settings.v1.settings_pb2 import GatewaySettings
from vmherd.gateway.app import run

settings = GatewaySettings(listen="127.0.0.1:0", controller=sys.argv[1], no_token=True)
asyncio.run(run(settings, address_file=Path(sys.argv[2])))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_whatever_is_under_way(short_dir: Path, number: signal.Signals) -> None:
    peer = Peer()
    peer.answers["Watch"] = peer.streaming(WatchResponse(), hang=True)
    controller, file = short_dir / "c.sock", short_dir / "address"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    async with rpc_serving(peer.services, controller), asyncio.timeout(DEADLINE_S):
        arguments = (sys.executable, "-c", PROGRAM, str(controller), str(file))
        process = await asyncio.create_subprocess_exec(*arguments, env=environment, stdout=asyncio.subprocess.PIPE)
        try:
            assert process.stdout is not None
            await process.stdout.readuntil(b"serving")  # it says so in its log, once the address is written
            address = file.read_text().strip()
            async with raw.connected(address) as (reader, writer):
                writer.write(raw.head("GET", "/v1/watch", address))
                await reader.readuntil(b'{"result":')
                process.send_signal(number)
                assert await process.wait() == 0
                assert b"GATEWAY_SHUTTING_DOWN" in await reader.read()
            assert not file.exists()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
