"""`vmherd agent` with a guest of a QEMU that vmherd did not start, alone and through the proxy."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cli.conftest import Cli
from tests.integration.cli.test_agent import shared
from tests.integration.image.bare_vm import TIMEOUT_S, BareVm, bare_vm
from vmherd.image.registry import KernelImage


@pytest.fixture(scope="module")
def vm(builtin_image: KernelImage) -> Iterator[BareVm]:
    with bare_vm(builtin_image, parameters="vmherd.hostname=web-1") as vm:
        assert vm.ask("guest-ping") == {}
        yield vm


@pytest.fixture(scope="module")
def path(vm: BareVm) -> Path:
    """The agent's socket, which nobody holds any more."""
    path = Path(vm.agent.getpeername())
    vm.agent.shutdown(socket.SHUT_RDWR)
    return path


@pytest.fixture(params=["alone", "shared"])
def address(request: pytest.FixtureRequest, path: Path, rundir: Path) -> Iterator[Path]:
    if request.param == "alone":
        yield path
        return
    with shared(path, rundir / "shared.sock"), socket.socket(socket.AF_UNIX) as other:
        other.settimeout(TIMEOUT_S)
        other.connect(str(rundir / "shared.sock"))
        other.sendall(b'{"execute": "guest-get-host-name"} {"execute": ')
        assert json.loads(other.recv(1000)) == {"return": {"host-name": "web-1"}}
        yield rundir / "shared.sock"


def test_commands_programs_and_files(cli: Cli, address: Path, rundir: Path) -> None:
    agent = ("agent", "--socket", str(address))
    assert json.loads(cli(*agent, "get-host-name").stdout) == {"host-name": "web-1"}
    assert "guest-get-host-name" in cli(*agent).stdout

    ended = cli(*agent, "exec", "-n", "--", "sh", "-c", "hostname; echo no >&2; exit 3")
    assert (ended.exit_code, ended.stdout, ended.stderr) == (3, "web-1\n", "no\n")

    data = os.urandom(300_000)
    (rundir / "there").write_bytes(data)
    assert cli(*agent, "cp", str(rundir / "there"), ":/tmp/there").exit_code == 0
    assert cli(*agent, "cp", ":/tmp/there", str(rundir / "back")).exit_code == 0
    assert (rundir / "back").read_bytes() == data


def test_shutdown_is_sent_and_not_waited_for(cli: Cli, vm: BareVm, path: Path) -> None:
    result = cli("agent", "--socket", str(path), "shutdown")
    assert (result.exit_code, result.stdout) == (0, "")
    assert vm.process.wait(TIMEOUT_S) == 0
    assert "the VM is off" in cli("agent", "--socket", str(path), "ping").stderr
