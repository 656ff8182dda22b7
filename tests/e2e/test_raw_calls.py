"""`vmherd guest`, and `vmherd agent` on a socket of vmherd's own, with a real guest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from tests.framework.herd import HerdUnderTest
from vmherd.cli.app import app
from vmherd.model.layout import RunDirectory

Guest = Callable[..., Result]


@pytest.fixture(scope="module")
def herd_with_guest(shared_herd: HerdUnderTest) -> HerdUnderTest:
    shared_herd.launch("web")
    return shared_herd


@pytest.fixture
def guest(herd_with_guest: HerdUnderTest) -> Guest:
    return lambda *words: CliRunner().invoke(app, ["--rundir", str(herd_with_guest.directory), "guest", *words])


def test_a_raw_call_gives_exact_json(guest: Guest) -> None:
    result = guest("web", "sync", "id=9223372036854775807")
    assert (result.exit_code, result.stdout) == (0, "9223372036854775807\n")
    assert json.loads(guest("web", "guest-get-host-name").stdout) == {"host-name": "web"}
    assert json.loads(guest("web", "get-osinfo", "{}", "--json").stdout)["id"]


def test_without_a_command_it_lists_what_the_agent_has(guest: Guest) -> None:
    lines = guest("web").stdout.splitlines()
    assert "guest-ping" in [line.split()[0] for line in lines[2:]]
    names = [command["name"] for command in json.loads(guest("web", "--json").stdout)["supported_commands"]]
    assert set(names) == {line.split()[0] for line in lines[2:]}


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["web", "make-coffee"], 1, "guest-make-coffee"),
        (["web", "exec-status", "pid=999999"], 1, "pid"),
        (["web", "sync", "7"], 2, "'7' is neither"),
        (["nobody", "ping"], 3, "nobody"),
    ],
)
def test_errors_have_exit_codes(guest: Guest, words: list[str], code: int, text: str) -> None:
    result = guest(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert text in result.stderr


@pytest.fixture
def completed(herd_with_guest: HerdUnderTest) -> Callable[..., list[str]]:
    def completed(*words: str) -> list[str]:
        given = ["vmherd", "--rundir", str(herd_with_guest.directory), *words]
        environment = {"_VMHERD_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(given)}
        return subprocess.run(
            [sys.executable, "-m", "vmherd"],
            env=environment | {"COMP_CWORD": str(len(given) - 1)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.split()

    return completed


def test_the_shell_completes_its_commands(completed: Callable[..., list[str]]) -> None:
    assert completed("guest", "web", "guest-get-hos") == ["guest-get-host-name"]
    assert completed("guest", "web", "get-hos") == ["get-host-name"]
    assert completed("guest", "nobody", "network-get-r") == ["network-get-route"]


def test_the_agents_socket_of_an_instance_is_held_by_the_controller(herd_with_guest: HerdUnderTest) -> None:
    uid = herd_with_guest.info("web")["uid"]
    path = RunDirectory(herd_with_guest.directory).instance(uid).agent
    result = CliRunner().invoke(app, ["agent", "--socket", str(path), "ping", "--timeout", "0.5"])
    assert result.exit_code == 6
    assert "another client holds the socket" in result.stderr
