"""What the service manager hears of the three processes, and that it is true."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vmherd.cli.herd_files import Flags, prepare, settings_file
from vmherd.model.layout import Herd

DEADLINE_S = 30.0
SERVICES = {"qemu": "vmherd.api.qemu.v1.QemuService", "controller": "vmherd.api.v1.ControllerService"}


@pytest.fixture
def herd() -> Iterator[Herd]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as directory:
        herd = Herd(Path(directory))
        prepare(herd, herd.path / "state", Flags(http="127.0.0.1:0", accelerator="tcg"))
        yield herd


@pytest.fixture
def manager(herd: Herd) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(herd.path / "notify"))
        manager.settimeout(DEADLINE_S)
        yield manager


@contextlib.contextmanager
def running(herd: Herd, name: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of the three, which is asked to end, and does so well."""
    command = [sys.executable, "-P", "-m", "vmherd", name, "--settings", str(settings_file(herd, name))]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


def heard(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().split("\n"))


def something_heard(manager: socket.socket) -> bool:
    readable, _, _ = select.select([manager], [], [], 0)
    return bool(readable and heard(manager))


def ask_grpc(herd: Herd, name: str) -> None:
    path = herd.qemu_socket if name == "qemu" else herd.controller_socket
    with grpc.insecure_channel(f"unix:{path}") as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICES[name])
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=DEADLINE_S)  # no second attempt
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("name", ["qemu", "controller", "gateway"])
def test_ready_is_when_it_serves_and_stopping_when_it_is_asked_to_end(
    herd: Herd, manager: socket.socket, name: str
) -> None:
    where = {"qemu": str(herd.qemu_socket), "controller": str(herd.controller_socket)}
    with running(herd, name, NOTIFY_SOCKET=str(herd.path / "notify")):
        ready = heard(manager)
        assert ready.pop("READY") == "1"
        status = ready.pop("STATUS")
        assert ready == {}
        if name == "gateway":
            assert httpx.get(f"{status.removeprefix('serving on ')}/healthz").status_code == 200
        else:
            assert status == f"serving on {where[name]}"
            ask_grpc(herd, name)
    assert heard(manager) == {"STOPPING": "1", "STATUS": "ending"}


def test_a_process_that_hangs_gives_no_sign_of_life(herd: Herd, manager: socket.socket) -> None:
    with running(herd, "controller", NOTIFY_SOCKET=str(herd.path / "notify"), WATCHDOG_USEC="20000") as process:
        assert heard(manager)["READY"] == "1"
        for _ in range(3):
            assert heard(manager) == {"WATCHDOG": "1"}
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        while something_heard(manager):  # what it said before
            pass
        process.send_signal(signal.SIGCONT)
        assert heard(manager) == {"WATCHDOG": "1"}


def test_a_process_that_cannot_serve_is_never_ready(herd: Herd, manager: socket.socket) -> None:
    herd.controller_socket.write_text("something else")
    command = [sys.executable, "-P", "-m", "vmherd", "controller", "--settings", str(settings_file(herd, "controller"))]
    environment = os.environ | {"NOTIFY_SOCKET": str(herd.path / "notify")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode != 0
    assert "something else is there" in done.stderr
    assert not something_heard(manager)
