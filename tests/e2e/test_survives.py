"""What a running instance survives, and what becomes of commands that were under way: real processes, really killed."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.framework.herd import AT_ONCE_S, PROCESSES, READY_TIMEOUT_S, HerdUnderTest, reason
from tests.framework.idle_kernel import idle_kernel

MOMENTS_S = (0.2, 0.1, 0.05, 0.02, 0.0)
"""How long before the end of a process a request is sent, which that end cuts off."""

SHUTS_DOWN_LATER = """#!/bin/sh
exec >/dev/console 2>&1
(echo it was told; until [ -e /run/go ]; do usleep 10000; done; exec busybox poweroff -f) &
"""
"""What a guest is made to do when its agent is told to shut it down."""

NAMES = tuple(f"i{index}" for index in range(len(MOMENTS_S)))


@pytest.fixture(scope="module")
def module_herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    """A herd with an image that starts in no time: its kernel halts and hears neither agent nor power button."""
    shared_herd.add_image("idle", idle_kernel())
    return shared_herd


@pytest.fixture(scope="module")
def web(module_herd: HerdUnderTest) -> dict[str, Any]:
    """An instance with a real guest, which most tests of this module share."""
    return module_herd.launch("web", until="ADDRESS")


@pytest.fixture
def herd(module_herd: HerdUnderTest) -> Iterator[HerdUnderTest]:
    """The module's herd. After each test all three processes run and every instance but the shared one is gone."""
    yield module_herd
    module_herd.complete()
    for name in names(module_herd) - {"web"}:
        module_herd.ask("DELETE", f"{name}?force=true")


@pytest.fixture
def idle(herd: HerdUnderTest) -> dict[str, Any]:
    """An instance of the image that starts in no time."""
    return herd.launch("idle", image="idle", until="QMP")


def names(herd: HerdUnderTest) -> set[str]:
    return {instance["name"] for instance in herd.http.get("/v1/instances").json()["instances"]}


def look(herd: HerdUnderTest, name: str, field: str = "revision") -> Any:
    """A field of an instance; None while it cannot be had."""
    return herd.http.get(f"/v1/instances/{name}").json().get(field)


def until_state(herd: HerdUnderTest, name: str, state: str) -> None:
    herd.eventually(lambda: look(herd, name, "state") == state)


def cut_off(herd: HerdUnderTest, process: str, request: Callable[[str], httpx.Response]) -> None:
    """Sends a request for each name at its moment, kills a process, and waits until it is back and ready."""
    before = look(herd, NAMES[0])
    end_s = time.monotonic() + MOMENTS_S[0]
    with ThreadPoolExecutor(len(NAMES)) as threads:
        answers = []
        for name, moment_s in zip(NAMES, MOMENTS_S, strict=True):
            time.sleep(max(0.0, end_s - moment_s - time.monotonic()))  # the moment is what is tested
            answers.append(threads.submit(request, name))
        herd.eventually(lambda: look(herd, NAMES[0]) != before)  # or nothing would be cut off on a slow host
        herd.restart(process)
        herd.wait_ready()
    for answer in answers:
        assert answer.result().status_code in (200, 503)


# A running instance.


@pytest.mark.parametrize(
    ("killed", "number"),
    [
        (("qemu",), signal.SIGKILL),
        (("controller",), signal.SIGKILL),
        (("gateway",), signal.SIGKILL),
        (PROCESSES, signal.SIGKILL),
        (PROCESSES, signal.SIGTERM),
    ],
    ids=["helper", "controller", "gateway", "all-three", "all-three-in-good-order"],
)
def test_a_running_instance_survives_the_end_of_our_processes(
    herd: HerdUnderTest, web: dict[str, Any], killed: tuple[str, ...], number: signal.Signals
) -> None:
    pid, boot_id, before = herd.qemu_pid(web["uid"]), herd.boot_id(), herd.info()
    herd.end(*killed, number=number)
    assert herd.qemu_pid(web["uid"]) == pid
    left = [path for path in (herd.files.qemu_socket, herd.files.controller_socket) if path.exists()]
    assert len(left) == (0 if number is signal.SIGTERM else 2)  # a kill leaves sockets, which must not be in the way
    herd.start(*killed)
    herd.eventually(lambda: herd.http.get("/v1/instances/web/guest/ping").status_code == 200, READY_TIMEOUT_S)
    assert (herd.qemu_pid(web["uid"]), herd.boot_id()) == (pid, boot_id)
    herd.wait_ready()
    may_differ = {"revision": "", "addresses": []}  # an IPv6 address comes some time after the first one
    assert herd.info() | may_differ == before | may_differ
    assert herd.info()["addresses"][:1] == before["addresses"][:1]


def test_the_helpers_absence_changes_nothing_while_qemu_can_be_asked(herd: HerdUnderTest, web: dict[str, Any]) -> None:
    before = herd.info()
    herd.end("qemu", number=signal.SIGKILL)
    herd.restart("controller")
    herd.eventually(lambda: herd.http.get("/v1/instances/web/guest/ping").status_code == 200)
    for method, path, body in (
        ("POST", "", {"name": "new", "image": "idle"}),
        ("DELETE", "/web?force=true", None),
        ("POST", "/web/restart", {}),
    ):
        refused = herd.http.request(method, f"/v1/instances{path}", json=body)
        assert (refused.status_code, reason(refused)) == (503, "HELPER_UNREACHABLE")
    assert "waiting for the helper" in herd.log("controller")
    assert herd.ask("POST", "web/pause")["state"] == "PAUSED"
    assert herd.ask("POST", "web/resume")["state"] == "RUNNING"
    herd.start("qemu")
    herd.wait_ready()
    changes = herd.stream("/v1/watch", name="web", from_revision=before["revision"])
    states = [next(changes)["result"]["instance"]["state"] for _ in range(2)]
    assert states == ["PAUSED", "RUNNING"]
    assert herd.info()["readiness"] == before["readiness"]


def test_a_watch_goes_on_where_the_last_one_ended(herd: HerdUnderTest, web: dict[str, Any]) -> None:
    def next_state(lines: Iterator[dict[str, Any]]) -> tuple[str, str]:
        change = next(lines)["result"]
        return change["instance"]["state"], change["revision"]

    first = herd.stream("/v1/watch", name="web", from_revision=herd.info()["revision"])
    herd.ask("POST", "web/pause")
    state, revision = next_state(first)
    assert state == "PAUSED"
    herd.end("controller", number=signal.SIGKILL)
    assert next(first)["error"]["code"] == 14
    herd.start("controller")
    herd.wait_ready()
    assert herd.info()["state"] == "PAUSED"
    herd.ask("POST", "web/resume")
    second = herd.stream("/v1/watch", name="web", from_revision=revision)
    state, resumed_at = next_state(second)
    assert (state, int(resumed_at)) == ("RUNNING", int(revision) + 1)


# QEMU itself ends.


@pytest.mark.parametrize(
    ("number", "died_of", "tail"),
    [(signal.SIGKILL, 9, ""), (signal.SIGTERM, None, "terminating on signal 15")],
    ids=["SIGKILL", "SIGTERM"],
)
def test_a_qemu_that_is_killed_is_noticed_at_once_and_starts_again(
    herd: HerdUnderTest, idle: dict[str, Any], number: signal.Signals, died_of: int | None, tail: str
) -> None:
    killed_s = time.monotonic()
    os.kill(herd.qemu_pid(idle["uid"]), number)
    failed = herd.wait("idle", "STOPPED")
    assert time.monotonic() - killed_s < AT_ONCE_S
    assert (failed["state"], failed["readiness"]["steps"]) == ("FAILED", [])
    assert (failed["lastExit"]["cause"], failed["lastExit"].get("signal")) == ("CRASHED", died_of)
    assert tail in failed["lastExit"]["stderrTail"]
    assert herd.qemu_pids_of(idle["uid"]) == []
    started = herd.ask("POST", "idle/start")
    assert (started["state"], started["generation"], started["uid"]) == ("RUNNING", 2, idle["uid"])


@pytest.mark.parametrize(
    ("away", "cause"),
    [(("controller",), "CRASHED"), (("qemu",), "VANISHED"), (("qemu", "controller"), "VANISHED")],
    ids=["controller", "helper", "both"],
)
def test_the_end_of_a_qemu_that_nobody_saw_is_found_out(
    herd: HerdUnderTest, idle: dict[str, Any], away: tuple[str, ...], cause: str
) -> None:
    herd.end(*away, number=signal.SIGKILL)
    os.kill(herd.qemu_pid(idle["uid"]), signal.SIGKILL)
    if "controller" not in away:
        until_state(herd, "idle", "UNKNOWN")
    herd.complete()
    failed = herd.wait("idle", "STOPPED")
    assert (failed["state"], failed["lastExit"]["cause"]) == ("FAILED", cause)
    started = herd.ask("POST", "idle/start")
    assert (started["state"], started["generation"]) == ("RUNNING", 2)


def test_unknown_is_never_dead(herd: HerdUnderTest) -> None:
    """Neither the helper nor QEMU can be asked; then the one comes back, then the other."""
    pids = {name: herd.qemu_pid(herd.launch(name, image="idle", until="QMP")["uid"]) for name in ("one", "two")}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    herd.end("qemu", "controller", number=signal.SIGKILL)
    herd.start("controller")
    for name in pids:
        until_state(herd, name, "UNKNOWN")
        stop = herd.http.post(f"/v1/instances/{name}/stop", json={})
        assert (stop.status_code, reason(stop)) == (400, "ILLEGAL_STATE")
        delete = herd.http.delete(f"/v1/instances/{name}?force=true")
        assert (delete.status_code, reason(delete)) == (503, "HELPER_UNREACHABLE")
    os.kill(pids["one"], signal.SIGCONT)
    until_state(herd, "one", "RUNNING")
    assert herd.info("two")["state"] == "UNKNOWN"
    herd.start("qemu")
    until_state(herd, "two", "RUNNING")
    assert set(pids.values()) <= set(herd.qemu_pids())
    assert herd.ask("POST", "two/stop", force=True)["lastExit"]["stopStep"] == "KILL"


# Commands that are under way.


@pytest.fixture
def running(herd: HerdUnderTest) -> dict[str, dict[str, Any]]:
    """A running instance for each moment."""
    return {name: herd.launch(name, image="idle", until="QMP") for name in NAMES}


@pytest.mark.parametrize("process", ["controller", "qemu"])
def test_a_launch_that_is_cut_off_comes_to_its_end(herd: HerdUnderTest, process: str) -> None:
    def launch(name: str) -> httpx.Response:
        return herd.http.post("/v1/instances", json={"name": name, "image": "idle", "request_id": f"{process}-{name}"})

    cut_off(herd, process, launch)
    for name in NAMES:
        launched = launch(name).json()
        assert (launched["state"], launched["generation"]) == ("RUNNING", 1)
        assert herd.info(name)["uid"] == launched["uid"]
        herd.qemu_pid(launched["uid"])  # exactly one
    assert len(list(herd.state.instances.iterdir())) == len(names(herd))


@pytest.mark.usefixtures("running")
def test_a_stop_that_is_cut_off_goes_on_and_not_straight_to_the_kill(herd: HerdUnderTest) -> None:
    def stop(name: str) -> httpx.Response:
        return herd.http.post(f"/v1/instances/{name}/stop", json={"grace": "1s", "request_id": f"stop-{name}"})

    cut_off(herd, "controller", stop)
    for name in NAMES:
        stopped = stop(name).json()
        assert (stopped["state"], stopped["lastExit"]["stopStep"]) == ("STOPPED", "QUIT")
        assert herd.qemu_pids_of(stopped["uid"]) == []


def test_a_kill_in_the_middle_of_a_stop_is_no_crash(herd: HerdUnderTest, idle: dict[str, Any]) -> None:
    """As an earlier controller leaves it that got as far as the kill."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(herd.http.post, "/v1/instances/idle/stop", json={"grace": "60s"})
        until_state(herd, "idle", "STOPPING")
        herd.end("controller", number=signal.SIGKILL)
    os.kill(herd.qemu_pid(idle["uid"]), signal.SIGKILL)
    herd.complete()
    stopped = herd.wait("idle", "STOPPED")
    assert (stopped["state"], stopped["lastExit"]["cause"], stopped["lastExit"]["signal"]) == ("STOPPED", "STOPPED", 9)


def test_a_restart_that_is_cut_off_restarts_once(herd: HerdUnderTest, running: dict[str, dict[str, Any]]) -> None:
    def restart(name: str) -> httpx.Response:
        body = {"grace": "0.05s", "request_id": f"restart-{name}"}
        return herd.http.post(f"/v1/instances/{name}/restart", json=body)

    cut_off(herd, "controller", restart)
    for name in NAMES:
        restarted = restart(name).json()
        assert (restarted["state"], restarted["generation"]) == ("RUNNING", 2)
        herd.qemu_pid(running[name]["uid"])  # exactly one


def test_a_delete_that_is_cut_off_leaves_nothing(herd: HerdUnderTest, running: dict[str, dict[str, Any]]) -> None:
    def delete(name: str) -> httpx.Response:
        return herd.http.delete(f"/v1/instances/{name}", params={"force": True, "request_id": f"delete-{name}"})

    cut_off(herd, "controller", delete)
    for name in NAMES:
        assert delete(name).status_code == 200
        uid = running[name]["uid"]
        assert herd.qemu_pids_of(uid) == []
        assert not herd.state.instance(uid).path.exists()
        assert not (herd.directory / "instances" / uid).exists()
    assert names(herd).isdisjoint(NAMES)


def test_a_guest_that_shuts_down_while_the_controller_is_away_was_stopped(
    herd: HerdUnderTest, web: dict[str, Any]
) -> None:
    herd.shell(f"mount -t tmpfs none /root && printf %s {shlex.quote(SHUTS_DOWN_LATER)} >/root/shutdown")
    herd.shell("chmod +x /root/shutdown && mount -o bind /root/shutdown /usr/bin/shutdown")
    with herd.at_console() as console, ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(herd.http.post, "/v1/instances/web/stop", json={"request_id": "stop-web"})
        console.hear("it was told")
        herd.end("controller", number=signal.SIGKILL)
        assert reason(stopping.result()) == "CONTROLLER_UNREACHABLE"
        console.type("touch /run/go")
        herd.eventually(lambda: herd.qemu_pids_of(web["uid"]) == [])
    herd.start("controller")
    herd.wait_ready()
    stopped = herd.ask("POST", "web/stop", request_id="stop-web")
    assert (stopped["state"], stopped["lastExit"]["cause"]) == ("STOPPED", "STOPPED")
    assert herd.ask("POST", "web/start")["generation"] == stopped["generation"] + 1
