"""What the guest agent's wire does not give: ends that are seen, freezes that end, sleep, calls that are cut off."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.framework.console import Console
from tests.framework.herd import AT_ONCE_S, HerdUnderTest, reason


@pytest.fixture
def herd(shared_herd: HerdUnderTest) -> Iterator[HerdUnderTest]:
    """The module's herd with a running instance whose agent answers; whatever a test did to it, the next one has it."""
    if shared_herd.http.get("/v1/instances/web").status_code == 404:
        shared_herd.launch("web")
    state = shared_herd.info()["state"]
    if state not in ("STOPPED", "FAILED", "RUNNING"):
        shared_herd.ask("POST", "web/stop", force=True)
    if state != "RUNNING":
        shared_herd.ask("POST", "web/start")
    shared_herd.wait("web", "AGENT")
    shared_herd.ask("POST", "web/guest/fsfreeze-thaw")
    yield shared_herd
    shared_herd.complete()


@pytest.fixture
def frozen(herd: HerdUnderTest) -> Callable[[str], dict[str, Any]]:
    """Freezes the guest's file systems, of which there is one, for so long."""

    def freeze(thaw_after: str) -> dict[str, Any]:
        herd.eventually(lambda: herd.run("test", "-e", "/dev/vda")["exitCode"] == 0)
        herd.shell(
            "grep -q ' /mnt ' /proc/mounts || "
            "{ mkdir -p /mnt; mke2fs /dev/vda 4096 >/dev/null; mount -t ext2 /dev/vda /mnt; }"
        )
        assert herd.ask("POST", "web/guest/fsfreeze-freeze", thawAfter=thaw_after) == {"frozen": "1"}
        return herd.info()

    return freeze


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[Any]]]:
    """Does something in a thread of its own."""
    with ThreadPoolExecutor() as threads:
        yield threads.submit


def ping(herd: HerdUnderTest) -> httpx.Response:
    return herd.http.get("/v1/instances/web/guest/ping", headers={"Grpc-Timeout": "30S"})


def freeze_status(herd: HerdUnderTest) -> str:
    return str(herd.ask("GET", "web/guest/fsfreeze-status")["status"])


def metadata(response: httpx.Response) -> dict[str, str]:
    [info] = [detail for detail in response.json()["details"] if "metadata" in detail]
    return dict(info["metadata"])


# Ends that are seen.


def test_a_power_off_is_done_when_the_guest_is_down(herd: HerdUnderTest) -> None:
    assert herd.ask("POST", "web/guest/shutdown") == {}
    off = herd.wait("web", "STOPPED")
    assert (off["state"], off["lastExit"]["cause"]) == ("STOPPED", "GUEST_SHUTDOWN")


def test_a_reboot_is_done_when_the_guest_is_reset(herd: HerdUnderTest) -> None:
    boot_id, pid = herd.boot_id(), herd.qemu_pid(herd.info()["uid"])
    assert herd.ask("POST", "web/guest/shutdown", mode="REBOOT") == {}
    assert herd.info()["readiness"]["reached"] == "QMP"
    herd.wait("web", "AGENT")
    assert herd.boot_id() != boot_id
    assert herd.qemu_pid(herd.info()["uid"]) == pid


def test_a_halt_is_done_when_the_agent_is_gone(herd: HerdUnderTest) -> None:
    assert herd.ask("POST", "web/guest/shutdown", mode="HALT") == {}
    halted = herd.info()
    assert (halted["state"], halted["readiness"]["reached"]) == ("RUNNING", "QMP")
    response = ping(herd)
    assert (response.status_code, reason(response)) == (503, "AGENT_NOT_RUNNING")
    herd.ask("POST", "web/stop", force=True)


def test_a_guest_that_refuses_says_why(herd: HerdUnderTest) -> None:
    started_s = time.monotonic()
    response = herd.http.post("/v1/instances/web/guest/suspend-hybrid", json={})
    assert (response.status_code, reason(response)) == (409, "AGENT_COMMAND_FAILED")
    assert "not supported" in response.json()["message"]
    assert metadata(response)["outcome_unknown"] == "False"
    assert time.monotonic() - started_s < AT_ONCE_S


def test_a_guest_that_takes_it_and_does_nothing(herd: HerdUnderTest) -> None:
    herd.shell("mount -t tmpfs none /root && echo '#!/bin/sh' >/root/shutdown && chmod +x /root/shutdown")
    herd.shell("mount -o bind /root/shutdown /usr/bin/shutdown")
    started_s = time.monotonic()
    headers = {"Grpc-Timeout": "5S"}
    response = herd.http.post("/v1/instances/web/guest/shutdown", json={"mode": "REBOOT"}, headers=headers)
    assert (response.status_code, reason(response)) == (504, "AGENT_UNRESPONSIVE")
    why = r"guest-shutdown: the guest did not reset itself within [1-4]\.?\d* s.*; outcome unknown$"
    assert re.search(why, response.json()["message"])
    assert metadata(response)["outcome_unknown"] == "True"
    assert time.monotonic() - started_s < AT_ONCE_S
    assert ping(herd).status_code == 200
    herd.shell("umount /usr/bin/shutdown; umount /root")


# A call that is cut off.


@pytest.fixture
def console(herd: HerdUnderTest) -> Iterator[Console]:
    """A shell in the guest that does not need its agent."""
    with herd.at_console() as console:
        yield console


@pytest.fixture
def under_way(herd: HerdUnderTest, console: Console, aside: Callable[..., Future[Any]]) -> Future[httpx.Response]:
    """A call that the agent is at work on, and will be: it opens a FIFO that nobody writes to."""
    herd.shell("mkdir -p /root/.ssh; mkfifo /root/.ssh/authorized_keys")
    url, headers = "/v1/instances/web/guest/ssh-get-authorized-keys", {"Grpc-Timeout": "60S"}
    call = aside(herd.http.get, url, params={"username": "root"}, headers=headers)
    console.type("until grep -q wait_for_partner /proc/$(pidof qemu-ga)/wchan; do :; done; echo it wa''its")
    console.hear("it waits")
    return call


def test_a_reset_ends_the_call_that_is_under_way(
    herd: HerdUnderTest, console: Console, under_way: Future[httpx.Response]
) -> None:
    before = herd.info()["readiness"]
    started_s = time.monotonic()
    console.type("echo b >/proc/sysrq-trigger")
    response = under_way.result()
    assert time.monotonic() - started_s < AT_ONCE_S
    assert (response.status_code, reason(response)) == (503, "AGENT_NOT_RUNNING")
    assert re.search("the guest (goes down|was reset).*; outcome unknown$", response.json()["message"])
    assert metadata(response)["outcome_unknown"] == "True"
    herd.wait("web", "AGENT")
    assert herd.info()["readiness"] != before


def test_the_end_of_qemu_ends_the_call_that_is_under_way(
    herd: HerdUnderTest, under_way: Future[httpx.Response]
) -> None:
    started_s = time.monotonic()
    os.kill(herd.qemu_pid(herd.info()["uid"]), signal.SIGKILL)
    response = under_way.result()
    assert time.monotonic() - started_s < AT_ONCE_S
    assert response.status_code == 503
    assert response.json()["message"].endswith("; outcome unknown")
    herd.wait("web", "STOPPED")


# A guest that sleeps.


def test_a_guest_that_sleeps(herd: HerdUnderTest) -> None:
    """Suspend, what cannot be done then, a new controller, and a wake-up: one story."""
    assert herd.ask("POST", "web/guest/suspend-ram") == {}
    asleep = herd.info()
    assert (asleep["state"], asleep["readiness"]["reached"]) == ("SUSPENDED", "QMP")
    for method, path, verb in (("GET", "guest/ping", "ask"), ("POST", "pause", "pause"), ("POST", "start", "start")):
        refused = herd.http.request(method, f"/v1/instances/web/{path}", json={} if method == "POST" else None)
        assert (refused.status_code, reason(refused)) == (400, "ILLEGAL_STATE")
        assert verb in refused.json()["message"]
        assert "SUSPENDED" in refused.json()["message"]
    refused = herd.http.delete("/v1/instances/web")
    assert (refused.status_code, reason(refused)) == (400, "ILLEGAL_STATE")

    herd.restart("controller")
    herd.wait_ready()
    herd.eventually(lambda: herd.info()["state"] == "SUSPENDED")
    assert [each["state"] for each in herd.http.get("/v1/instances").json()["instances"]] == ["SUSPENDED"]

    assert herd.ask("POST", "web/resume")["state"] == "RUNNING"
    herd.wait("web", "AGENT")
    assert ping(herd).status_code == 200


def test_a_stop_wakes_a_guest_that_sleeps(herd: HerdUnderTest) -> None:
    herd.ask("POST", "web/guest/suspend-ram")
    stopped = herd.ask("POST", "web/stop", grace="60s")
    assert (stopped["state"], stopped["lastExit"]["stopStep"]) == ("STOPPED", "AGENT")


# File systems that are frozen.


def test_a_frozen_guest_says_so_and_can_be_thawed(herd: HerdUnderTest, frozen: Callable[[str], dict[str, Any]]) -> None:
    assert frozen("600s")["frozenUntil"]
    refused = herd.http.get("/v1/instances/web/guest/get-osinfo")
    assert (refused.status_code, reason(refused)) == (400, "AGENT_FROZEN")
    first = herd.info()["frozenUntil"]
    again = herd.http.post("/v1/instances/web/guest/fsfreeze-freeze", json={"thawAfter": "1s"})
    assert (again.status_code, reason(again)) == (400, "AGENT_FROZEN")
    assert (ping(herd).status_code, freeze_status(herd), herd.info()["frozenUntil"]) == (200, "FROZEN", first)
    assert herd.ask("POST", "web/guest/fsfreeze-thaw") == {"thawed": "1"}
    assert herd.info().get("frozenUntil") is None
    assert freeze_status(herd) == "THAWED"
    assert herd.ask("GET", "web/guest/get-osinfo")["machine"] == "x86_64"


def test_a_freeze_ends_by_itself_also_when_the_controller_was_killed(
    herd: HerdUnderTest, frozen: Callable[[str], dict[str, Any]]
) -> None:
    frozen("6s")  # and no sooner, so that the killed controller has not ended it
    herd.end("controller", number=signal.SIGKILL)
    herd.start("controller")
    herd.wait_ready()
    herd.eventually(lambda: herd.info().get("frozenUntil") is None)
    assert freeze_status(herd) == "THAWED"
    herd.shell("echo written >/mnt/file && sync")
    assert "a freeze has to end" in herd.log("controller")


def test_a_stop_thaws_first(herd: HerdUnderTest, frozen: Callable[[str], dict[str, Any]]) -> None:
    frozen("600s")
    stopped = herd.ask("POST", "web/stop", grace="30s")
    assert (stopped["state"], stopped["lastExit"]["stopStep"]) == ("STOPPED", "AGENT")
    assert stopped.get("frozenUntil") is None


def test_a_reboot_ends_a_freeze(herd: HerdUnderTest, console: Console, frozen: Callable[[str], dict[str, Any]]) -> None:
    assert frozen("600s")["frozenUntil"]
    console.type("echo b >/proc/sysrq-trigger")
    herd.eventually(lambda: herd.info().get("frozenUntil") is None)
    herd.wait("web", "AGENT")
    assert freeze_status(herd) == "THAWED"


# A controller that is killed in the middle of a call.


def test_a_call_that_was_cut_off_is_not_made_twice(herd: HerdUnderTest, aside: Callable[..., Future[Any]]) -> None:
    command = ["sh", "-c", "echo once >>/run/count; sleep 60"]
    calling = aside(herd.http.post, "/v1/instances/web/run", json={"command": command})
    herd.eventually(lambda: herd.run("test", "-s", "/run/count")["exitCode"] == 0)
    herd.restart("controller")
    herd.wait_ready()
    response = calling.result()
    assert (response.status_code, reason(response)) == (503, "CONTROLLER_UNREACHABLE"), response.text
    assert response.json()["message"].endswith("; outcome unknown")
    assert metadata(response)["outcome_unknown"] == "True"
    assert herd.shell("cat /run/count") == "once\n"
