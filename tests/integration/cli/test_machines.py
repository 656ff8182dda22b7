"""The command line with all that belongs to it: three processes, QEMU, and the built-in guest."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.cli.conftest import END_TIMEOUT_S, Cli, started, welcome
from vmherd.cli import traces
from vmherd.model.layout import Herd

DEMO_TIMEOUT_S = 100.0


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
