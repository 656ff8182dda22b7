"""Programs in the built-in guest: live, with input, ended with their callers, and detached."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.framework.herd import HerdUnderTest, herd_under_test, reason
from vmherd.image.registry import KernelImage

TIMEOUT_S = 60.0
ROOM = {"memoryMib": 512}
"""Files are in memory there, and an agent that captures 16 MiB takes several times as much."""


@pytest.fixture(scope="module")
def web(builtin_image: KernelImage) -> Iterator[HerdUnderTest]:
    """A herd with one guest, which every test leaves as it was."""
    with herd_under_test(builtin_image) as herd:
        herd.launch("web", hardware=ROOM)
        yield herd


@pytest.fixture(autouse=True)
def nothing_left(web: HerdUnderTest) -> Iterator[None]:
    yield
    web.eventually(lambda: left_in(web) == ("", ""))


def left_in(herd: HerdUnderTest) -> tuple[str, str]:
    """Output files, and programs that a test has started: those that are called `sleep 60…`."""
    files = herd.shell("ls -A /tmp | grep vmherd || true")
    programs = herd.shell("ps -o pid,args | grep '[s]leep 60' || true")
    return files, programs


def command(herd: HerdUnderTest, *words: str) -> list[str]:
    return [sys.executable, "-m", "vmherd", "--rundir", str(herd.directory), *words]


def vmherd(herd: HerdUnderTest, *words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    given: Any = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(command(herd, *words), check=False, capture_output=True, timeout=TIMEOUT_S, **given)


def started(herd: HerdUnderTest, *words: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(herd, *words), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )


def events(herd: HerdUnderTest, method: str, path: str, **body: Any) -> Iterator[dict[str, Any]]:
    """The server-sent events of a stream."""
    headers = {"Accept": "text/event-stream"}
    with herd.http.stream(method, f"/v1/instances/{path}", json=body or None, headers=headers) as response:
        assert response.headers["content-type"] == "text/event-stream"
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def text_of(found: list[dict[str, Any]], stream: str) -> str:
    return "".join(event["output"]["text"] for event in found if event.get("output", {}).get("stream") == stream)


def test_exec_is_as_if_it_ran_here(web: HerdUnderTest) -> None:
    done = vmherd(web, "exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"err\n")
    assert vmherd(web, "exec", "web", "--", "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    missing = vmherd(web, "exec", "web", "--", "no-such-program")
    assert missing.returncode == 127
    assert b"no-such-program" in missing.stderr


def test_exec_shows_output_while_the_command_runs(web: HerdUnderTest) -> None:
    script = "echo first; while ! [ -e /run/go ]; do sleep 0.1; done; rm /run/go; echo second"
    with started(web, "exec", "web", "--", "sh", "-c", script) as running:
        assert running.stdout
        assert running.stdout.readline() == b"first\n"
        assert running.poll() is None
        web.shell("touch /run/go")
        assert running.stdout.readline() == b"second\n"
        assert running.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize("size", [0, 1000, 3 << 20])
def test_exec_forwards_its_input(web: HerdUnderTest, size: int) -> None:
    data = os.urandom(size)
    done = vmherd(web, "exec", "web", "--", "sha256sum", stdin=data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_exec_passes_every_byte(web: HerdUnderTest) -> None:
    every_byte = bytes(range(256)) * 3
    assert vmherd(web, "exec", "web", "--", "cat", stdin=every_byte).stdout == every_byte


def test_exec_answers_while_its_input_is_open(web: HerdUnderTest) -> None:
    with started(web, "exec", "web", "--", "cat", stdin=subprocess.PIPE) as running:
        assert running.stdin
        assert running.stdout
        for line in (b"one\n", b"two\n"):
            running.stdin.write(line)
            assert running.stdout.readline() == line
        running.stdin.close()
        assert running.wait(TIMEOUT_S) == 0


def test_exec_without_input_does_not_wait_for_it(web: HerdUnderTest) -> None:
    with started(web, "exec", "web", "-n", "--", "cat", stdin=subprocess.PIPE) as running:
        assert running.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_exec_ends_the_command(web: HerdUnderTest, number: signal.Signals) -> None:
    with started(web, "exec", "web", "--", "sh", "-c", "echo on; sleep 60") as running:
        assert running.stdout
        running.stdout.readline()
        running.send_signal(number)
        assert running.wait(TIMEOUT_S) == 128 + number


def test_an_exec_that_is_killed_ends_the_command(web: HerdUnderTest) -> None:
    with started(web, "exec", "web", "--", "sh", "-c", "echo on; sleep 60") as running:
        assert running.stdout
        running.stdout.readline()
        running.kill()


def test_an_exec_whose_output_nobody_reads_ends_the_command(web: HerdUnderTest) -> None:
    with started(web, "exec", "web", "--", "sh", "-c", "while :; do echo line; sleep 0.05; done; sleep 60") as running:
        assert running.stdout
        assert running.stderr
        running.stdout.readline()
        running.stdout.close()
        assert running.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
        assert running.stderr.read() == b""


def test_exec_ends_a_command_whose_time_is_up(web: HerdUnderTest) -> None:
    done = vmherd(web, "exec", "web", "--timeout", "5", "--", "sh", "-c", "echo on; sleep 60")
    assert (done.returncode, done.stdout) == (6, b"on\n")
    assert b"did not end within 5 s and was ended" in done.stderr


def test_exec_as_json_is_one_event_a_line(web: HerdUnderTest) -> None:
    done = vmherd(web, "exec", "web", "--json", "--", "sh", "-c", "printf 'ab\\377'; exit 3")
    assert done.returncode == 3
    first, output, last = map(json.loads, done.stdout.splitlines())
    assert first["process"]["state"] == "RUNNING"
    assert output["output"]["raw"] == "YWL/"
    assert (last["process"]["state"], last["process"]["exitCode"]) == ("EXITED", 3)


def test_run_over_http_is_one_plain_call(web: HerdUnderTest) -> None:
    result = web.run("sh", "-c", "cat; echo err >&2; exit 3", input="aGVsbG8=")
    assert (result["exitCode"], result["stdout"], result["stderr"]) == (3, "hello", "err\n")


def test_run_gives_output_beyond_what_the_agent_keeps(web: HerdUnderTest) -> None:
    words = ["head", "-c", str(17 << 20), "/dev/zero"]
    cut = web.run(*words)
    assert (len(cut["stdout"]), cut["stdoutTruncated"]) == (16 << 20, True)
    whole = web.run(*words, wholeOutput=True)
    assert (len(whole["stdout"]), whole["stdoutTruncated"]) == (17 << 20, False)


def test_run_ends_a_command_whose_time_is_up(web: HerdUnderTest) -> None:
    for extra in ({}, {"wholeOutput": True}):
        body = {"command": ["sleep", "60"], "timeout": "3s", **extra}
        response = web.http.post("/v1/instances/web/run", json=body)
        assert (response.status_code, reason(response)) == (504, "COMMAND_TIMED_OUT")
        web.eventually(lambda: left_in(web) == ("", ""))


def test_a_stream_over_http_shows_output_while_the_command_runs(web: HerdUnderTest) -> None:
    script = "echo first; while ! [ -e /run/go ]; do sleep 0.1; done; rm /run/go; echo second >&2; exit 5"
    found = []
    for event in events(web, "POST", "web/run/stream", command=["sh", "-c", script]):
        found.append(event)
        if event.get("output", {}).get("text") == "first\n":
            web.shell("touch /run/go")
    assert (text_of(found, "STDOUT"), text_of(found, "STDERR")) == ("first\n", "second\n")
    assert (found[0]["process"]["state"], found[-1]["process"]["exitCode"]) == ("RUNNING", 5)


@pytest.mark.parametrize("path", ["run", "run/stream"])
def test_an_http_client_that_leaves_ends_the_command(web: HerdUnderTest, path: str) -> None:
    body = json.dumps({"command": ["sleep", "60"], "timeout": "50s"})
    head = [
        f"POST /v1/instances/web/{path} HTTP/1.1",
        f"Host: {web.address}",
        f"Authorization: Bearer {web.token}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    host, port = web.address.split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall("\r\n".join([*head, "", body]).encode())
        web.eventually(lambda: "sleep 60" in left_in(web)[1])


def test_a_wrong_process_is_refused(web: HerdUnderTest) -> None:
    assert reason(web.http.get("/v1/instances/web/processes/00000000")) == "PROCESS_NOT_FOUND"
    response = web.http.post("/v1/instances/web/run/stream", json={"command": []})
    assert (response.status_code, response.json()["code"]) == (400, 3)
    response = web.http.post("/v1/instances/nobody/processes", json={"command": ["true"]})
    assert reason(response) == "INSTANCE_NOT_FOUND"


def test_many_streams_at_once_get_each_their_own_output(web: HerdUnderTest) -> None:
    def text(number: int) -> str:
        found = list(events(web, "POST", "web/run/stream", command=["sh", "-c", f"sleep 0.2; echo {number}"]))
        return text_of(found, "STDOUT")

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(text, range(20))) == [f"{number}\n" for number in range(20)]


def test_a_detached_command_is_started_listed_followed_and_deleted(web: HerdUnderTest) -> None:
    script = "echo first; while ! [ -e /run/go ]; do sleep 0.1; done; rm /run/go; echo second; exit 7"
    done = vmherd(web, "exec", "web", "--detach", "--", "sh", "-c", script)
    process_id = done.stdout.decode().strip()
    [process] = web.ask("GET", "web/processes")["processes"]
    assert (process["id"], process["state"], process["command"][0]) == (process_id, "RUNNING", "sh")
    assert process_id in vmherd(web, "ps", "web").stdout.decode()

    now = vmherd(web, "process", "follow", "web", process_id, "--no-wait")
    assert (now.returncode, now.stdout) == (0, b"first\n")
    with started(web, "process", "follow", "web", process_id) as follower:
        assert follower.stdout
        assert follower.stdout.readline() == b"first\n"
        assert vmherd(web, "process", "delete", "web", process_id).returncode == 4
        web.shell("touch /run/go")
        assert follower.stdout.readline() == b"second\n"
        assert follower.wait(TIMEOUT_S) == 7

    late = list(events(web, "GET", f"web/processes/{process_id}/follow?stdoutOffset=6"))
    assert text_of(late, "STDOUT") == "second\n"
    assert (late[-1]["process"]["state"], late[-1]["process"]["exitCode"]) == ("EXITED", 7)
    web.ask("DELETE", f"web/processes/{process_id}")
    assert web.ask("GET", "web/processes")["processes"] == []


def test_a_detached_command_is_signalled_and_ended(web: HerdUnderTest) -> None:
    def start(**fields: Any) -> str:
        process = web.ask("POST", "web/processes", command=["sh", "-c", "sleep 60 & sleep 60; true"], **fields)
        return str(process["id"])

    signalled, forced, late = start(), start(), start(timeout="3s")
    assert vmherd(web, "process", "kill", "web", signalled, "-s", "KILL").returncode == 0
    web.ask("DELETE", f"web/processes/{forced}?force=true")

    def state(process_id: str) -> tuple[str, int, str]:
        process = web.ask("GET", f"web/processes/{process_id}")
        return process["state"], process.get("exitCode", 0), process["reason"]

    web.eventually(lambda: state(signalled) == ("EXITED", 137, ""))
    web.eventually(lambda: state(late)[0] == "EXITED")
    assert state(late)[1:] == (143, "its time was up")
    response = web.http.post(f"/v1/instances/web/processes/{signalled}/signal", json={})
    assert (response.status_code, reason(response)) == (400, "ILLEGAL_PROCESS_STATE")
    for process_id in (signalled, late):
        web.ask("DELETE", f"web/processes/{process_id}")


def test_a_controller_that_ends_takes_its_callers_commands_along(web: HerdUnderTest) -> None:
    with started(web, "exec", "web", "--", "sh", "-c", "echo on; exec sleep 60") as running:
        assert running.stdout
        running.stdout.readline()
        web.restart("controller", number=signal.SIGTERM)
        assert running.wait(TIMEOUT_S) == 5
        assert running.stderr
        assert b"shutting down" in running.stderr.read()
    web.wait_ready()
    web.wait("web")


def test_a_detached_command_outlives_the_controller(web: HerdUnderTest) -> None:
    script = "echo first; while ! [ -e /run/go ]; do sleep 0.1; done; rm /run/go; echo second; exit 9"
    runs = web.ask("POST", "web/processes", command=["sh", "-c", script])["id"]
    ended = web.ask("POST", "web/processes", command=["sh", "-c", "echo done; exit 8"])["id"]
    web.eventually(lambda: web.ask("GET", f"web/processes/{ended}")["state"] == "EXITED")
    web.restart("controller")
    web.wait_ready()
    assert web.ask("GET", f"web/processes/{ended}")["exitCode"] == 8
    web.eventually(lambda: web.http.get("/v1/instances/web").json().get("readiness", {}).get("reached") is not None)
    web.wait("web")
    assert web.ask("GET", f"web/processes/{runs}")["state"] == "RUNNING"
    web.shell("touch /run/go")
    found = list(events(web, "GET", f"web/processes/{runs}/follow"))
    assert text_of(found, "STDOUT") == "first\nsecond\n"
    assert found[-1]["process"]["exitCode"] == 9
    for process_id in (runs, ended):
        web.ask("DELETE", f"web/processes/{process_id}")


def test_a_detached_command_is_lost_with_the_guests_agent(web: HerdUnderTest) -> None:
    process_id = web.ask("POST", "web/processes", command=["sh", "-c", "echo on; exec sleep 60"])["id"]
    with web.agent_coming_back():
        web.http.post("/v1/instances/web/run", json={"command": ["killall", "qemu-ga"], "timeout": "1s"})
    web.eventually(lambda: web.ask("GET", f"web/processes/{process_id}")["state"] == "LOST")
    process = web.ask("GET", f"web/processes/{process_id}")
    assert process["reason"] == "the guest's agent does not know it any more: it was started anew"
    assert "sleep 60" in left_in(web)[1]  # a process of an earlier agent is nobody's to end
    web.shell("killall sleep")
    web.ask("DELETE", f"web/processes/{process_id}")


def test_a_detached_command_is_lost_with_the_guests_boot(web: HerdUnderTest) -> None:
    process_id = web.ask("POST", "web/processes", command=["sh", "-c", "echo on; exec sleep 60"])["id"]
    boot_id = web.boot_id()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lambda: list(events(web, "GET", f"web/processes/{process_id}/follow")))
        web.http.post("/v1/instances/web/run", json={"command": ["reboot", "-f"], "timeout": "1s"})
        last = following.result(TIMEOUT_S)[-1]["process"]
    assert (last["state"], last["reason"]) == ("LOST", "the guest was started anew")
    assert "exitCode" not in last
    web.wait("web")
    assert web.boot_id() != boot_id
    web.ask("DELETE", f"web/processes/{process_id}")


def test_detached_commands_end_with_their_instance(web: HerdUnderTest) -> None:
    process_id = web.ask("POST", "web/processes", command=["sleep", "60"])["id"]
    web.ask("POST", "web/stop", force=True)
    web.eventually(lambda: web.ask("GET", f"web/processes/{process_id}")["state"] == "LOST")
    assert web.ask("GET", f"web/processes/{process_id}")["reason"] == "the instance was stopped"
    web.http.delete("/v1/instances/web")
    web.launch("web", hardware=ROOM)
    assert web.ask("GET", "web/processes")["processes"] == []
