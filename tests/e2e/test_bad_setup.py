"""Processes that cannot start or have no neighbours: each says what is wrong, and works once that is mended."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.framework.herd import HerdUnderTest
from tests.framework.idle_kernel import idle_kernel
from tests.framework.refusals import command, fails, refused, vmherd

OLD_QEMU = """#!/bin/sh
echo 'QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)'
"""


@pytest.fixture(scope="module")
def herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    """A herd with one instance that runs."""
    shared_herd.add_image("idle", idle_kernel())
    shared_herd.launch("idle", image="idle", until="QMP")
    return shared_herd


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with room for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="vmherd-") as path:
        yield Path(path)


@pytest.fixture
def files_unchanged(herd: HerdUnderTest) -> Iterator[None]:
    """The test leaves every file of the herd as it is, but for what the running processes themselves write."""

    def files() -> set[Path]:
        return set(herd.directory.rglob("*"))

    before = files(), herd.fingerprint()
    yield
    assert (files(), herd.fingerprint()) == before


def starts_badly(name: str, settings: Path, exit_code: int, *words: str) -> None:
    """Starts one of the processes, which is to end at once with one line that tells why."""
    fails(vmherd(name, "--settings", str(settings)), exit_code, *words)


def changed(herd: HerdUnderTest, name: str, path: Path, **fields: Any) -> Path:
    """A copy of a process's settings with some of them changed."""
    path.write_text(json.dumps(json.loads(herd.settings(name).read_text()) | fields))
    return path


@pytest.mark.usefixtures("files_unchanged")
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("qemu", None, ["cannot read the settings file", "No such file"]),
        ("controller", "{", [":1:2: not JSON"]),
        ("gateway", "[]", ["must be a JSON object"]),
        ("qemu", '{"listen": "/s", "run_dir": "/r", "state_dir": "/s", "x": 1}', ["unknown field 'x'", "are listen,"]),
        ("controller", '{"listen": 5, "qemu": "/q", "run_dir": "/r", "state_dir": "/s"}', ["listen"]),
        ("gateway", "{}", ["listen is required", "controller is required", "token_file is required"]),
    ],
)
def test_settings_that_make_no_sense(
    herd: HerdUnderTest, short_dir: Path, name: str, text: str | None, words: list[str]
) -> None:
    settings = short_dir / f"{name}.json"
    if text is not None:
        settings.write_text(text)
    starts_badly(name, settings, 2, str(settings), *words)


@pytest.mark.usefixtures("files_unchanged")
@pytest.mark.parametrize("name", ["controller", "gateway"])
def test_a_port_that_is_taken(herd: HerdUnderTest, short_dir: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        elsewhere = {"listen": str(short_dir / "s"), "state_dir": str(short_dir / "state"), "listen_tcp": address}
        fields = elsewhere if name == "controller" else {"listen": address}
        starts_badly(name, changed(herd, name, short_dir / "settings", **fields), 4, f"cannot listen on {address}")
    assert not (short_dir / "s").exists()


@pytest.mark.usefixtures("files_unchanged")
@pytest.mark.parametrize("name", ["qemu", "controller", "gateway"])
def test_a_socket_path_that_is_too_long(herd: HerdUnderTest, short_dir: Path, name: str) -> None:
    far = short_dir / ("deep" * 30)
    field = {"qemu": "run_dir", "controller": "run_dir", "gateway": "controller"}[name]
    starts_badly(name, changed(herd, name, short_dir / "s", **{field: str(far)}), 4, str(far), "takes 107", "shorter")
    assert not far.exists()


@pytest.mark.usefixtures("files_unchanged")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qemu", ["instances", "another helper works in it"]),
        ("controller", ["state", "another controller works in it"]),
        ("gateway", ["cannot listen on 127.0.0.1"]),
    ],
)
def test_a_second_process_in_the_same_directory(herd: HerdUnderTest, name: str, words: list[str]) -> None:
    starts_badly(name, herd.settings(name), 4, *words)
    assert herd.http.get("/v1/instances/idle").status_code == 200
    herd.launch("web", image="idle", until="QMP")  # the first one still works
    assert herd.http.delete("/v1/instances/web", params={"force": True}).status_code == 200


@pytest.mark.usefixtures("files_unchanged")
@pytest.mark.parametrize(
    ("name", "field", "words"),
    [
        ("qemu", "listen", ["another helper works in it"]),
        ("controller", "listen", ["another controller works in it"]),
        ("controller", "state_dir", ["another process serves", "controller.sock"]),
    ],
)
def test_a_second_process_that_shares_one_path_less(
    herd: HerdUnderTest, short_dir: Path, name: str, field: str, words: list[str]
) -> None:
    starts_badly(name, changed(herd, name, short_dir / "settings", **{field: str(short_dir / "own")}), 4, *words)


@pytest.mark.usefixtures("files_unchanged")
@pytest.mark.parametrize(
    ("name", "field", "below", "words"),
    [
        ("qemu", "run_dir", "", ["run_dir: cannot use", "choose another"]),
        ("qemu", "state_dir", "", ["state_dir: cannot use", "choose another"]),
        ("qemu", "listen", "/s", ["cannot make the socket", "this user may write to"]),
        ("controller", "state_dir", "", ["state directory", "cannot be used", "choose another"]),
        ("controller", "listen", "/s", ["cannot make the socket", "this user may write to"]),
        ("controller", "listen", "", ["cannot make the socket", "something else is there"]),
        ("controller", "token_file", "/token", ["cannot read the token file"]),
        ("gateway", "token_file", "/token", ["cannot read the token file"]),
    ],
)
def test_a_directory_that_cannot_be_written(
    herd: HerdUnderTest, short_dir: Path, name: str, field: str, below: str, words: list[str]
) -> None:
    """Root may write anywhere, but not below a file."""
    file = short_dir / "file"
    file.write_text("precious")
    elsewhere = {"qemu": {"run_dir": str(short_dir / "run")}, "controller": {"state_dir": str(short_dir / "state")}}
    fields = elsewhere.get(name, {}) | {"listen": "127.0.0.1:0" if name == "gateway" else str(short_dir / "s")}
    settings = changed(herd, name, short_dir / "settings", **fields | {field: f"{file}{below}"})
    starts_badly(name, settings, 4, str(file), *words)
    assert file.read_text() == "precious"


def lines(herd: HerdUnderTest, name: str, event: str) -> int:
    """How many lines of a log, from this start on, tell of this event."""
    return sum(event in line for line in herd.log(name).splitlines())


def test_a_controller_without_a_helper_waits_and_says_so_once(herd: HerdUnderTest) -> None:
    herd.end("qemu", "controller")
    said = lines(herd, "controller", "waiting for the helper")
    herd.start("controller")
    herd.eventually(lambda: herd.http.get("/readyz").status_code == 200)
    herd.eventually(lambda: lines(herd, "controller", "waiting for the helper") == said + 1)
    herd.wait("idle", "QMP")  # QEMU itself can be asked, which the store is told
    before = herd.store_revision(), herd.fingerprint()
    for response in (
        herd.http.post("/v1/instances", json={"name": "web", "image": "idle"}),
        herd.http.post("/v1/instances", json={"name": "web", "image": "idle", "start": False}),
        herd.http.post("/v1/instances:plan", json={"name": "web", "image": "idle"}),
        herd.http.post("/v1/instances/idle/stop", json={"force": True}),
        herd.http.post("/v1/instances/idle/restart", json={}),
        herd.http.delete("/v1/instances/idle", params={"force": True}),
    ):
        refused(response, 503, "UNAVAILABLE", "HELPER_UNREACHABLE", str(herd.files.qemu_socket), "is `vmherd qemu` run")
        assert response.headers["Retry-After"] == "1"
    fails(command(herd, "launch", "web"), 5, "the helper cannot be reached", "is `vmherd qemu` running?")
    assert herd.info("idle")["state"] == "RUNNING"
    assert (herd.store_revision(), herd.fingerprint()) == before
    assert lines(herd, "controller", "waiting for the helper") == said + 1
    herd.start("qemu")
    herd.wait_ready()
    herd.launch("web", image="idle", until="QMP")
    assert herd.http.delete("/v1/instances/web", params={"force": True}).status_code == 200


def test_a_gateway_without_a_controller_waits_and_says_so_once(herd: HerdUnderTest) -> None:
    herd.end("controller", "gateway")
    said = lines(herd, "gateway", "waiting for the controller")
    herd.start("gateway")
    herd.eventually(lambda: herd.http.get("/healthz").status_code == 200)
    herd.eventually(lambda: lines(herd, "gateway", "waiting for the controller") == said + 1)
    for response in (
        herd.http.get("/readyz"),
        herd.http.get("/v1/instances"),
        herd.http.get("/v1/watch"),
        herd.http.post("/v1/instances", json={"name": "web", "image": "idle"}),
    ):
        words = str(herd.files.controller_socket), "is `vmherd controller` running?"
        refused(response, 503, "UNAVAILABLE", "CONTROLLER_UNREACHABLE", *words)
    fails(command(herd, "list"), 5, "no controller's socket in", "start one with")
    assert lines(herd, "gateway", "waiting for the controller") == said + 1
    herd.start("controller")
    herd.wait_ready()
    assert herd.info("idle")["state"] == "RUNNING"


def test_a_helper_that_goes_away(herd: HerdUnderTest) -> None:
    before = herd.store_revision(), herd.fingerprint()
    herd.end("qemu", number=signal.SIGKILL)
    response = herd.http.post("/v1/instances", json={"name": "web", "image": "idle"})
    refused(response, 503, "UNAVAILABLE", "HELPER_UNREACHABLE", "is `vmherd qemu` running?")
    assert (herd.store_revision(), herd.fingerprint()) == before
    herd.start("qemu")
    herd.wait_ready()
    herd.launch("web", image="idle", until="QMP")
    assert herd.http.delete("/v1/instances/web", params={"force": True}).status_code == 200
    assert herd.fingerprint() == before[1]


@pytest.mark.parametrize(
    ("program", "reason", "words"),
    [
        (None, "QEMU_MISSING", ["there is no program", "install QEMU", "qemu-system-x86"]),
        ("#!/bin/sh\necho hello\n", "QEMU_MISSING", ["does not say that it is QEMU"]),
        ("#!/bin/sh\nexit 1\n", "QEMU_MISSING", ["cannot be asked for its version"]),
        (OLD_QEMU, "QEMU_TOO_OLD", ["is QEMU 5.2.0", "needs 7.0 or newer", "qemu-system-x86"]),
    ],
    ids=["missing", "another program", "broken", "too old"],
)
def test_a_qemu_that_cannot_be_used(
    herd: HerdUnderTest, short_dir: Path, program: str | None, reason: str, words: list[str]
) -> None:
    path = short_dir / "qemu"
    if program is not None:
        path.write_text(program)
        path.chmod(0o755)
        short_dir.chmod(0o755)  # another user executes it, where the helper is root
    before = herd.store_revision(), herd.fingerprint()
    restart_helper(herd, qemu_binary=str(path))
    try:
        plan = {"name": "web", "image": "idle"}
        herd.eventually(lambda: reason in herd.http.post("/v1/instances:plan", json=plan).text)
        response = herd.http.post("/v1/instances", json={"name": "web", "image": "idle"})
        refused(response, 400, "FAILED_PRECONDITION", reason, str(path), *words)
        assert herd.info("idle")["state"] == "RUNNING"
        assert (herd.store_revision(), herd.fingerprint()) == before
    finally:
        restart_helper(herd, qemu_binary="")
    herd.wait_ready()


def restart_helper(herd: HerdUnderTest, **fields: Any) -> None:
    herd.end("qemu")
    herd.settings("qemu", **fields)
    herd.start("qemu")


@contextlib.contextmanager
def no_file_larger_than(herd: HerdUnderTest, limit_bytes: int) -> Iterator[None]:
    """Lets no file of the controller grow beyond a size: what a full disk does to it, without one."""
    pid = herd.processes["controller"].pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def test_a_state_directory_that_is_full(herd: HerdUnderTest) -> None:
    before = herd.store_revision(), herd.fingerprint()
    with no_file_larger_than(herd, 0):
        for response in (
            herd.http.post("/v1/instances", json={"name": "web", "image": "idle", "requestId": "full"}),
            herd.http.post("/v1/instances/idle/restart", json={}),
            herd.http.post("/v1/instances/idle/stop", json={"requestId": "full-too"}),
        ):
            words = "nothing was changed", "is the disk of the state directory full?"
            refused(response, 429, "RESOURCE_EXHAUSTED", "STORE_FAILED", *words)
        assert herd.info("idle")["state"] == "RUNNING"
    assert (herd.store_revision(), herd.fingerprint()) == before
    herd.launch("web", image="idle", until="QMP", requestId="full")
    assert herd.http.delete("/v1/instances/web", params={"force": True}).status_code == 200


@pytest.mark.parametrize("start", [False, True])
def test_a_disk_that_there_is_no_room_for(herd: HerdUnderTest, start: bool) -> None:
    before = herd.fingerprint()
    with no_file_larger_than(herd, 64 << 20):
        response = herd.http.post("/v1/instances", json={"name": "web", "image": "idle", "start": start})
    refused(response, 409, "ABORTED", "START_FAILED", "cannot make the disk", "File too large")
    assert herd.http.post("/v1/instances/web/start", json={}).json()["state"] == "RUNNING"
    assert herd.http.delete("/v1/instances/web", params={"force": True}).status_code == 200
    assert herd.fingerprint() == before
