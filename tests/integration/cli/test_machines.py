"""The command line with all that belongs to it: three processes, QEMU, and the built-in guest."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.framework.netns import needs_root, own_network
from tests.integration.cli.conftest import END_TIMEOUT_S, Cli, started, welcome
from vmherd.cli import traces
from vmherd.model.layout import Herd

DEMO_TIMEOUT_S = 100.0
SAYS_HELLO = """
nc -ll -p 7777 -e echo hello >/dev/null 2>&1 </dev/null &
until netstat -ltn | grep -q :7777 && ip address | grep -q 10.0.2.15; do usleep 50000; done
"""


def qemus(herd: Herd) -> list[int]:
    return [pid for pid, name in traces.processes(herd.path).items() if name.startswith("qemu-system")]


def test_instances_outlive_the_processes_unless_they_are_to_be_stopped(herd: Herd, cli: Cli) -> None:
    with started(herd, "--accelerator", "tcg") as up:
        assert "instances  none yet" in welcome(up)
        launched = cli("launch", "web")
        assert launched.exit_code == 0, launched.stderr
        assert re.fullmatch(r"web: running at [0-9.]+\n", launched.stdout)
        (pid,) = qemus(herd)
    assert qemus(herd) == [pid]

    with started(herd, "--stop-instances") as up:
        assert "instances  1, 1 of them running" in welcome(up)
        assert qemus(herd) == [pid]
        up.send_signal(signal.SIGINT)
        output, errors = up.communicate(timeout=END_TIMEOUT_S)
    assert output.splitlines()[-3:] == [
        "stopping web",
        "web: stopped by the guest agent's shutdown",
        "ending the three processes",
    ]
    assert errors == ""
    assert qemus(herd) == []

    with started(herd) as up:
        assert "instances  1, 0 of them running" in welcome(up)
        assert cli("delete", "web").exit_code == 0


def test_the_commands_of_a_life(herd: Herd, cli: Cli) -> None:
    with started(herd, "--accelerator", "tcg") as up:
        welcome(up)
        assert cli("launch", "web", "--no-start", "--label", "tier=front").stdout == "web: stopped\n"
        assert cli("start", "web").stdout == "web: running\n"
        assert cli("wait", "web", "--until", "address").exit_code == 0
        listed = json.loads(cli("list", "--label", "tier=front", "--json").stdout)
        assert [instance["readiness"]["reached"] for instance in listed["instances"]] == ["ADDRESS"]

        assert cli("exec", "web", "--", "hostname").stdout == "web\n"
        script = r"""printf '\000\377'; echo "$A" >&2; exit 7"""
        ran = cli("exec", "web", "--env", "A=1", "--", "sh", "-c", script)
        assert (ran.exit_code, ran.stdout_bytes, ran.stderr) == (7, b"\x00\xff", "1\n")

        assert cli("pause", "web").stdout == "web: paused at 10.0.2.15\n"
        assert cli("resume", "web").stdout == "web: running at 10.0.2.15\n"
        assert cli("delete", "web").exit_code == 4
        assert cli("stop", "web", "--force").stdout == "web: stopped by killing QEMU\n"
        assert cli("stop", "web").exit_code == 4
        assert cli("delete", "web").exit_code == 0
        assert cli("info", "web").exit_code == 3


@pytest.fixture
def namespace() -> Iterator[None]:
    with own_network():
        yield


@needs_root
@pytest.mark.usefixtures("namespace")
def test_a_network_and_a_forward(herd: Herd, cli: Cli) -> None:
    assert herd.path.stat().st_mode & 0o077 == 0  # and yet the network's DHCP server, another user, finds its files
    with started(herd, "--accelerator", "tcg", "--subnet", "10.77.0.0/24", "--stop-instances") as up:
        text = welcome(up)
        assert "network    default: 10.77.0.0/24, on bridge vmherd0" in text
        match = re.search(r"vmherd0 stays; `(\S+) qemu --settings (\S+) --teardown`", text)
        assert match
        _heading, line = cli("networks").stdout.splitlines()
        assert line.split()[:4] == ["default", "vmherd0", "10.77.0.0/24", "10.77.0.1"]

        planned = cli("plan", "web", "--network", "default", "--forward", "22", "--network", "user")
        assert planned.exit_code == 0, planned.stderr
        assert "#   default, " in planned.stdout
        assert "10.77.0.2" in planned.stdout
        assert "# rules:" in planned.stdout
        assert "user,id=net1,hostfwd=tcp:127.0.0.1:0-:22" in planned.stdout
        assert {name for _, name in socket.if_nameindex()} == {"lo", "vmherd0"}

        launched = cli("launch", "web", "--network", "default", "--network", "user", "--forward", "7777")
        assert launched.exit_code == 0, launched.stderr
        forward = re.search(r"127\.0\.0\.1:(\d+) → 7777/tcp", launched.stdout)
        assert forward
        assert cli("exec", "web", "--timeout", "60", "--", "sh", "-c", SAYS_HELLO).exit_code == 0
        with socket.create_connection(("127.0.0.1", int(forward[1])), timeout=30) as connection:
            assert connection.recv(100) == b"hello\n"
        assert cli("exec", "web", "--", "ping", "-c", "1", "-W", "9", "10.77.0.1").exit_code == 0
        assert re.search(r"networks +default, 52:\S+, 10\.77\.0\.2\s", cli("info", "web").stdout)
        # One of the two may come later, from the guest or from the DHCP server.
        told = re.compile(r"10\.77\.0\.2/24( on eth\d)?, 52:\S+ \((agent|lease)\)")
        deadline_s = time.monotonic() + 60
        while not told.search(shown := cli("info", "web").stdout):
            assert time.monotonic() < deadline_s, shown
            time.sleep(0.1)
        refused = cli("launch", "web2", "--network", "defualt")
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "defualt" in refused.stderr

        assert cli("update", "web", "--autostart").exit_code == 0
        assert "autostart" in cli("info", "web").stdout
        stopped = cli("stop", "--all", "--timeout", "60")
        assert (stopped.exit_code, stopped.stderr) == (0, "")
        assert stopped.stdout == "web: stopped by the guest agent's shutdown\n"
        assert cli("delete", "web").exit_code == 0
    assert "vmherd0" in {name for _, name in socket.if_nameindex()}
    subprocess.run([match[1], "qemu", "--settings", match[2], "--teardown"], check=True, timeout=END_TIMEOUT_S)
    assert {name for _, name in socket.if_nameindex()} == {"lo"}


@contextmanager
def demo() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "vmherd", "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


def directory_in(output: str) -> Path:
    match = re.search(r"three processes in (\S+),", output)
    assert match, output
    return Path(match[1])


@pytest.mark.usefixtures("builtin_image")
def test_the_demo_tells_a_whole_life_and_leaves_nothing() -> None:
    with demo() as process:
        output, errors = process.communicate(timeout=DEMO_TIMEOUT_S)
        assert errors == ""
        assert process.returncode == 0
    for told in (
        "launch",
        "agent",
        "address",
        "host name demo",
        "10.0.2.15",
        "$ uname -a",
        "by the guest agent's",
        "delete",
    ):
        assert told in output
    assert "no process, no socket, no interface, no file" in output
    assert not directory_in(output).exists()


@pytest.mark.usefixtures("builtin_image")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_cleans_up(number: signal.Signals) -> None:
    with demo() as process:
        assert process.stdout
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("ready"):
                break
        directory = directory_in(output)
        assert any(name.startswith("qemu-system") for name in traces.processes(directory).values())
        process.send_signal(number)
        rest, errors = process.communicate(timeout=DEMO_TIMEOUT_S)
        assert errors == ""
        assert process.returncode == 130
    assert "no process, no socket, no interface, no file" in rest
    assert traces.processes(directory) == {}
    assert not directory.exists()
