"""The life of an instance, from its launch to nothing being left, with real QEMU and a real guest agent."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.framework.console import Console
from tests.framework.gate import Gate
from tests.framework.herd import AT_ONCE_S, HerdUnderTest, reason
from tests.framework.idle_kernel import idle_kernel
from vmherd.model.machine import mac_of

RUNGS = ["PROCESS", "QMP", "AGENT", "ADDRESS"]


@pytest.fixture(scope="module")
def web(shared_herd: HerdUnderTest) -> dict[str, Any]:
    """A running instance that most tests of this module share; each leaves it with its agent at work."""
    return shared_herd.launch("web", until="ADDRESS", labels={"tier": "front"})


@pytest.fixture
def db(shared_herd: HerdUnderTest) -> dict[str, Any]:
    """Another running instance. A test may stop it, for the next one starts it again."""
    if shared_herd.http.get("/v1/instances/db").status_code == 404:
        return shared_herd.launch("db")
    if shared_herd.info("db")["state"] == "STOPPED":
        shared_herd.ask("POST", "db/start")
    return shared_herd.wait("db", "AGENT")


@pytest.fixture
def deaf(shared_herd: HerdUnderTest) -> Iterator[dict[str, Any]]:
    """A running instance whose guest hears neither agent nor power button, since it is a kernel that halts."""
    if not (shared_herd.state.images / "idle").exists():
        shared_herd.add_image("idle", idle_kernel())
    yield shared_herd.launch("deaf", image="idle", until="QMP")
    shared_herd.ask("DELETE", "deaf?force=true")


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[Any]]]:
    """Does something in a thread of its own."""
    with ThreadPoolExecutor() as threads:
        yield threads.submit


def once_running(herd: HerdUnderTest, program: str, name: str) -> None:
    herd.eventually(lambda: herd.run("pidof", program, name=name)["exitCode"] == 0)


def ping(herd: HerdUnderTest, name: str, timeout: str) -> httpx.Response:
    return herd.http.get(f"/v1/instances/{name}/guest/ping", headers={"Grpc-Timeout": timeout})


def is_there(herd: HerdUnderTest, file: str) -> bool:
    """Whether a file of the guest has something in it; no while nobody can tell."""
    response = herd.http.post("/v1/instances/web/run", json={"command": ["test", "-s", file]})
    return bool(response.json().get("exitCode") == 0)


def freeze_agent(console: Console) -> None:
    """Stops the guest agent's process, as if it hung."""
    console.type("killall -STOP qemu-ga && echo the agent st''ops")
    console.hear("the agent stops")


def look(herd: HerdUnderTest, name: str) -> str | None:
    """The state of an instance; None while there is none of this name."""
    return herd.http.get(f"/v1/instances/{name}").json().get("state")


def changes(herd: HerdUnderTest, after: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How an instance changes from a revision on."""
    for line in herd.stream("/v1/watch", name=after["name"], from_revision=after["revision"]):
        yield line["result"]["instance"]


# A guest that runs.


def test_a_launch_climbs_rung_by_rung(web: dict[str, Any]) -> None:
    assert (web["state"], web["generation"], web["labels"]) == ("RUNNING", 1, {"tier": "front"})
    steps = web["readiness"]["steps"]
    assert [step["rung"] for step in steps] == RUNGS
    assert web["readiness"]["reached"] == RUNGS[-1]
    elapsed_s = [float(step["elapsed"].removesuffix("s")) for step in steps]
    assert elapsed_s == sorted(elapsed_s)
    assert 0 < elapsed_s[0] < elapsed_s[-1] < 60
    assert [step["reachTime"] for step in steps] == sorted(step["reachTime"] for step in steps)
    assert web["createTime"] < steps[0]["reachTime"]


def test_the_addresses_are_those_of_the_instances_nic(shared_herd: HerdUnderTest, web: dict[str, Any]) -> None:
    mac = mac_of(web["uid"])
    interfaces = shared_herd.ask("GET", "web/guest/network-get-interfaces")["interfaces"]
    [nic] = [interface for interface in interfaces if interface.get("hardwareAddress") == mac]
    in_guest = {address["ipAddress"] for address in nic["ipAddresses"]}
    assert "lo" in {interface["name"] for interface in interfaces}
    [ipv4] = [address for address in web["addresses"] if ":" not in address["address"]]
    assert ipv4["address"] in in_guest
    assert ipv4 | {"address": ""} == {
        "address": "",
        "prefixLength": 24,
        "mac": mac,
        "interface": nic["name"],
        "source": "AGENT",
    }
    assert {address["mac"] for address in web["addresses"]} == {mac}


@pytest.mark.usefixtures("web")
def test_what_the_agent_tells(shared_herd: HerdUnderTest) -> None:
    assert shared_herd.ask("GET", "web/guest/ping") == {}
    info = shared_herd.ask("GET", "web/guest/info")
    assert info["version"][0].isdigit()
    assert {"name": "guest-ping", "enabled": True, "successResponse": True} in info["supportedCommands"]
    assert shared_herd.ask("GET", "web/guest/get-host-name") == {"hostName": "web"}
    os_info = shared_herd.ask("GET", "web/guest/get-osinfo")
    assert os_info["machine"] == "x86_64"
    assert os_info["kernelRelease"] == shared_herd.shell("uname -r").strip()


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(
    ("command", "fields", "expected"),
    [
        (["sh", "-c", "echo out; echo err >&2; exit 3"], {}, {"exitCode": 3, "stdout": "out\n", "stderr": "err\n"}),
        (["sh", "-c", "kill -9 $$"], {}, {"exitCode": 137, "signal": 9}),
        (["cat"], {"input": base64.b64encode(b"h\xc3\xa9\n").decode()}, {"exitCode": 0, "stdout": "h\u00e9\n"}),
        (["/usr/bin/env"], {"environment": {"A": "b c"}}, {"exitCode": 0, "stdout": "A=b c\n"}),
        (["echo", "; reboot", "$HOME", "*"], {}, {"exitCode": 0, "stdout": "; reboot $HOME *\n"}),
        (
            ["printf", r"a\377b"],
            {},
            {"exitCode": 0, "stdout": "a\ufffdb", "stdoutRaw": base64.b64encode(b"a\xffb").decode()},
        ),
    ],
    ids=["exit-code", "signal", "input", "environment", "no-shell", "not-utf-8"],
)
def test_run(shared_herd: HerdUnderTest, command: list[str], fields: dict[str, Any], expected: dict[str, Any]) -> None:
    nothing = {"exitCode": 0, "stdout": "", "stderr": "", "notice": ""}
    whole = {"stdoutTruncated": False, "stderrTruncated": False}
    assert shared_herd.run(*command, **fields) == nothing | whole | expected


@pytest.mark.usefixtures("web")
def test_run_of_a_program_that_is_not_there(shared_herd: HerdUnderTest) -> None:
    response = shared_herd.http.post("/v1/instances/web/run", json={"command": ["/no/such/program"]})
    assert (response.status_code, reason(response)) == (409, "AGENT_COMMAND_FAILED")
    assert "No such file or directory" in response.json()["message"]


@pytest.mark.usefixtures("web")
def test_run_ends_a_command_that_takes_too_long(shared_herd: HerdUnderTest) -> None:
    response = shared_herd.http.post("/v1/instances/web/run", json={"command": ["sleep", "60.125"], "timeout": "5s"})
    assert (response.status_code, reason(response)) == (504, "COMMAND_TIMED_OUT")
    assert "was ended" in response.json()["message"]
    [info] = [detail for detail in response.json()["details"] if "metadata" in detail]
    pid = info["metadata"]["pid"]
    assert shared_herd.shell(f"test -e /proc/{pid} || echo gone") == "gone\n"


@pytest.mark.usefixtures("web")
def test_pause_and_resume(shared_herd: HerdUnderTest) -> None:
    assert shared_herd.ask("POST", "web/pause")["state"] == "PAUSED"
    refused = shared_herd.http.get("/v1/instances/web/guest/ping")
    assert (refused.status_code, reason(refused)) == (400, "ILLEGAL_STATE")
    assert "PAUSED" in refused.json()["message"]
    again = shared_herd.http.post("/v1/instances/web/pause", json={})
    assert (again.status_code, reason(again)) == (400, "ILLEGAL_STATE")
    assert shared_herd.ask("POST", "web/resume")["state"] == "RUNNING"
    assert shared_herd.ask("GET", "web/guest/ping") == {}


@pytest.mark.usefixtures("web")
def test_an_agent_that_dies_is_missed_at_once_and_found_again(
    shared_herd: HerdUnderTest, aside: Callable[..., Future[Any]]
) -> None:
    with shared_herd.at_console("web") as console:
        # The second time within a second, in which QEMU tells that the port opened and not that it closed.
        for file in ("/run/first", "/run/second"):
            command = ["sh", "-c", f"echo begun >{file}; exec sleep 60"]
            running = aside(shared_herd.http.post, "/v1/instances/web/run", json={"command": command})
            shared_herd.eventually(lambda file=file: is_there(shared_herd, file))
            before = shared_herd.info()
            started = time.monotonic()
            console.type("killall -9 qemu-ga")
            response = running.result()
            assert (response.status_code, reason(response)) == (504, "COMMAND_UNFINISHED")
            seen = changes(shared_herd, before)
            fallen = next(instance for instance in seen if instance["readiness"]["reached"] == "QMP")
            assert time.monotonic() - started < AT_ONCE_S
            assert (fallen["state"], fallen["addresses"]) == ("RUNNING", [])
            found = next(instance for instance in seen if instance["readiness"]["reached"] == "ADDRESS")
            assert found["readiness"]["steps"][:2] == before["readiness"]["steps"][:2]
            assert found["readiness"]["steps"][2]["reachTime"] > before["readiness"]["steps"][2]["reachTime"]
            shared_herd.eventually(lambda: ping(shared_herd, "web", "30S").status_code == 200)


@pytest.mark.usefixtures("web")
def test_a_guest_that_writes_nonsense_to_its_console_runs_on(shared_herd: HerdUnderTest, web: dict[str, Any]) -> None:
    escapes = r"\033]0;title\007\033[2J\000\r\n"
    shared_herd.shell(f"printf '{escapes}' >/dev/console; head -c 200000 /dev/urandom >/dev/console")
    console = shared_herd.state.instance(web["uid"]).console_log
    shared_herd.eventually(lambda: console.stat().st_size > 200_000)
    assert b"\033]0;title\007\033[2J\0" in console.read_bytes()
    assert shared_herd.info()["state"] == "RUNNING"
    assert shared_herd.ask("GET", "web/guest/ping") == {}


@pytest.mark.usefixtures("web", "db")
def test_a_guest_that_hangs_delays_nobody_else(shared_herd: HerdUnderTest, aside: Callable[..., Future[Any]]) -> None:
    with shared_herd.at_console("db") as console:
        freeze_agent(console)
        response = ping(shared_herd, "db", "1S")
        assert (response.status_code, reason(response)) == (504, "AGENT_UNRESPONSIVE")
        assert response.json()["message"].startswith("'db': guest-ping: ")
        hanging = aside(ping, shared_herd, "db", "60S")
        for _ in range(10):
            assert ping(shared_herd, "web", "60S").status_code == 200
            assert shared_herd.info("db")["state"] == "RUNNING"
            assert len(shared_herd.http.get("/v1/instances").json()["instances"]) == 2
        assert not hanging.done()
        console.type("killall -CONT qemu-ga")
        assert hanging.result().status_code == 200


def test_a_guest_that_reboots_keeps_its_process_and_climbs_again(
    shared_herd: HerdUnderTest, db: dict[str, Any]
) -> None:
    pid, boot_id = shared_herd.qemu_pid(db["uid"]), shared_herd.boot_id("db")
    before = shared_herd.info("db")
    with shared_herd.at_console("db") as console:
        console.type("reboot")
        seen = changes(shared_herd, before)
        fallen = next(instance for instance in seen if instance["readiness"]["reached"] == "QMP")
        assert fallen["state"] == "RUNNING"
        risen = next(instance for instance in seen if instance["readiness"]["reached"] == "AGENT")
    assert (risen["state"], risen["generation"]) == ("RUNNING", 1)
    assert shared_herd.boot_id("db") != boot_id
    assert shared_herd.qemu_pid(db["uid"]) == pid


# From start to end and over again.


def test_one_life(shared_herd: HerdUnderTest) -> None:
    """Launch, stop, start, restart, power-off, panic, delete: one story, after which nothing is left."""
    herd = shared_herd
    launched = herd.launch("cat", until="ADDRESS")
    uid, pid = launched["uid"], herd.qemu_pid(launched["uid"])

    herd.ask("POST", "cat/pause")  # a stop lets the guest run on, so that it hears of it
    stopped = herd.ask("POST", "cat/stop")
    assert (stopped["state"], stopped["readiness"]["steps"], stopped["addresses"]) == ("STOPPED", [], [])
    assert {key: stopped["lastExit"][key] for key in ("cause", "stopStep", "exitCode")} == {
        "cause": "STOPPED",
        "stopStep": "AGENT",
        "exitCode": 0,
    }
    assert not os.path.exists(f"/proc/{pid}")
    refused = herd.http.get("/v1/instances/cat/guest/ping")
    assert (refused.status_code, reason(refused)) == (400, "ILLEGAL_STATE")

    started = herd.ask("POST", "cat/start")
    assert (started["uid"], started["generation"]) == (uid, 2)
    herd.wait("cat", "AGENT")
    restarted = herd.ask("POST", "cat/restart")
    assert (restarted["uid"], restarted["generation"], restarted["state"]) == (uid, 3, "RUNNING")

    herd.wait("cat", "AGENT")
    with herd.at_console("cat") as console:
        console.type("poweroff")
        off = herd.wait("cat", "STOPPED")
    assert (off["state"], off["lastExit"]["cause"], off["lastExit"]["exitCode"]) == ("STOPPED", "GUEST_SHUTDOWN", 0)
    assert off["lastExit"]["stopStep"] == "STOP_STEP_UNSPECIFIED"

    herd.ask("POST", "cat/start")
    herd.wait("cat", "ADDRESS")
    with herd.at_console("cat") as console:
        console.type("echo c >/proc/sysrq-trigger")
        panicked = herd.wait("cat", "STOPPED")
    assert (panicked["state"], panicked["lastExit"]["cause"]) == ("FAILED", "GUEST_PANIC")
    assert "sysrq triggered crash" in herd.console(uid)

    herd.ask("DELETE", "cat")
    assert herd.http.get("/v1/instances/cat").status_code == 404
    assert not herd.state.instance(uid).path.exists()
    assert not (herd.directory / "instances" / uid).exists()


# The ladder of a stop.


def test_the_power_button_works_where_the_agent_hangs(shared_herd: HerdUnderTest, db: dict[str, Any]) -> None:
    once_running(shared_herd, "acpid", "db")
    with shared_herd.at_console("db") as console:
        freeze_agent(console)
        stopped = shared_herd.ask("POST", "db/stop", grace="10s")  # for the agent, and then for the button
    assert (stopped["state"], stopped["lastExit"]["stopStep"]) == ("STOPPED", "POWER_BUTTON")
    assert stopped["lastExit"]["cause"] == "STOPPED"


@pytest.mark.usefixtures("db")
def test_qemu_quits_where_the_guest_hears_nothing(shared_herd: HerdUnderTest) -> None:
    once_running(shared_herd, "acpid", "db")
    shared_herd.shell("killall -STOP acpid", name="db")
    with shared_herd.at_console("db") as console:
        freeze_agent(console)
    stopped = shared_herd.ask("POST", "db/stop", grace="0.5s")
    assert (stopped["state"], stopped["lastExit"]["stopStep"]) == ("STOPPED", "QUIT")


def test_the_kill_ends_a_qemu_that_hears_nothing(
    shared_herd: HerdUnderTest, deaf: dict[str, Any], aside: Callable[..., Future[Any]]
) -> None:
    pid = shared_herd.qemu_pid(deaf["uid"])
    os.kill(pid, signal.SIGSTOP)
    stopping = aside(shared_herd.ask, "POST", "deaf/stop", grace="0.5s")
    shared_herd.eventually(lambda: shared_herd.info("deaf")["state"] == "STOPPING")
    assert stopping.result()["lastExit"]["stopStep"] == "KILL"
    assert not os.path.exists(f"/proc/{pid}")


def test_force_kills_at_once(shared_herd: HerdUnderTest, deaf: dict[str, Any]) -> None:
    pid = shared_herd.qemu_pid(deaf["uid"])
    started = time.monotonic()
    stopped = shared_herd.ask("POST", "deaf/stop", force=True)
    assert time.monotonic() - started < AT_ONCE_S
    assert (stopped["state"], stopped["lastExit"]["stopStep"], stopped["lastExit"]["signal"]) == ("STOPPED", "KILL", 9)
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.usefixtures("deaf")
def test_a_second_stop_joins_the_first_and_force_hastens_both(
    shared_herd: HerdUnderTest, aside: Callable[..., Future[Any]]
) -> None:
    stops = [aside(shared_herd.ask, "POST", "deaf/stop", grace="60s") for _ in range(2)]
    shared_herd.eventually(lambda: shared_herd.info("deaf")["state"] == "STOPPING")
    started = time.monotonic()
    forced = shared_herd.ask("POST", "deaf/stop", force=True)
    assert forced["lastExit"]["stopStep"] == "KILL"
    assert [stop.result() for stop in stops] == [forced, forced]
    assert time.monotonic() - started < AT_ONCE_S


def test_a_launch_answers_as_soon_as_qemu_does(shared_herd: HerdUnderTest, deaf: dict[str, Any]) -> None:
    starts = 3
    for _ in range(starts):
        shared_herd.ask("POST", "deaf/stop", force=True)
        started = time.monotonic()
        assert shared_herd.ask("POST", "deaf/start")["readiness"]["reached"] == "QMP"
        assert time.monotonic() - started < AT_ONCE_S
    assert shared_herd.info("deaf")["generation"] == deaf["generation"] + starts


def test_of_many_deletes_at_once_each_gets_its_answer(
    shared_herd: HerdUnderTest, aside: Callable[..., Future[Any]]
) -> None:
    shared_herd.launch("cat", until="", start=False)
    deletes = [aside(shared_herd.http.delete, "/v1/instances/cat") for _ in range(8)]
    codes = [delete.result().status_code for delete in deletes]
    assert 200 in codes
    assert set(codes) <= {200, 404}


def test_a_stop_ends_a_start_that_is_under_way(shared_herd: HerdUnderTest, aside: Callable[..., Future[Any]]) -> None:
    herd = shared_herd
    with Gate(herd).closed():
        launching = aside(herd.http.post, "/v1/instances", json={"name": "cat"})
        herd.eventually(lambda: look(herd, "cat") == "STARTING")
        stopping = aside(herd.ask, "POST", "cat/stop", grace="0.1s")
        launched = launching.result()
        assert (launched.status_code, reason(launched)) == (409, "SUPERSEDED")
    stopped = stopping.result()
    assert (stopped["state"], stopped["lastExit"]["cause"]) == ("STOPPED", "STOPPED")
    started = herd.ask("POST", "cat/start")
    assert (started["state"], started["generation"]) == ("RUNNING", 2)
    herd.ask("DELETE", "cat?force=true")
