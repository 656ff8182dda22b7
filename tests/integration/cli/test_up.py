"""`vmherd up` with the three real processes, and without a machine."""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.framework.netns import needs_root, own_network
from tests.integration.cli.conftest import END_TIMEOUT_S, Cli, started, welcome
from vmherd.api.v1.controller_pb2 import ListRequest
from vmherd.api.v1.controller_pb2_grpc import ControllerServiceStub
from vmherd.cli import traces
from vmherd.cli.herd_files import Flags, prepare, settings_file
from vmherd.client import Client
from vmherd.model.layout import Herd


def refused(herd: Herd, *options: str) -> tuple[int, str]:
    """The exit code and the one line of an `up` that is not to start."""
    code, (line,) = refused_at_length(herd, *options)
    return code, line


def refused_at_length(herd: Herd, *options: str) -> tuple[int, list[str]]:
    """The exit code and the lines of an `up` that is not to start."""
    done = subprocess.run(
        [sys.executable, "-m", "vmherd", "up", "--rundir", str(herd.path), *options],
        capture_output=True,
        text=True,
        timeout=END_TIMEOUT_S,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_says_how_to_get_in_and_ends_when_asked(herd: Herd, number: signal.Signals) -> None:
    with started(herd) as up:
        text = welcome(up)
        assert sorted(map(_command, traces.processes(herd.path))) == ["controller", "gateway", "qemu"]

        token = herd.token.read_text().strip()
        assert f"$(cat {herd.token})" in text
        assert token not in text
        match = re.search(r"http://(\S+)/v1/instances", text)
        assert match
        connection = http.client.HTTPConnection(match[1], timeout=5)
        connection.request("GET", "/v1/instances", headers={"Authorization": f"Bearer {token}"})
        assert connection.getresponse().status == 200
        connection.close()
        with Client(herd.controller_socket) as client:
            assert [list(page.instances) for page in client.pages()] == [[]]

        up.send_signal(number)
        assert up.wait(END_TIMEOUT_S) == 0
        assert traces.processes(herd.path) == {}


@pytest.mark.parametrize("name", ["qemu", "controller", "gateway"])
def test_it_says_which_process_died_and_ends_the_others(herd: Herd, name: str) -> None:
    with started(herd) as up:
        welcome(up)
        (pid,) = [pid for pid in traces.processes(herd.path) if _command(pid) == name]
        os.kill(pid, signal.SIGKILL)
        assert up.wait(END_TIMEOUT_S) == 1
        assert up.stderr
        line, *tail = up.stderr.read().splitlines()
    assert line == f"vmherd: {name} was ended by SIGKILL; its log is {herd.logs}/{name}.log"
    assert tail == (herd.logs / f"{name}.log").read_text().splitlines()[-len(tail) :]
    assert 0 < len(tail) <= 10
    assert traces.processes(herd.path) == {}
    for left in herd.path.glob("*.sock*"):  # nobody can clean up after a SIGKILL; the next start does
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def test_when_it_is_killed_the_three_end_and_the_next_one_starts(herd: Herd) -> None:
    with started(herd) as up:
        welcome(up)
        descriptors = [os.pidfd_open(pid) for pid in traces.processes(herd.path)]
        assert len(descriptors) == 3
        up.kill()
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], END_TIMEOUT_S)[0]
            os.close(descriptor)
    with started(herd) as up:  # and clears away what they may not have had the time for
        welcome(up)


def test_a_process_that_cannot_start_is_shown_with_the_reason(herd: Herd) -> None:
    with open(f"{herd.qemu_socket}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with started(herd) as up:
            assert up.wait(END_TIMEOUT_S) == 1
            assert up.stderr
            first, *tail = up.stderr.read().splitlines()
    assert first.startswith("vmherd: qemu ended with code 4;")
    assert tail[-1].startswith(f"vmherd: another process serves {herd.qemu_socket}")
    os.unlink(f"{herd.qemu_socket}.lock")


def test_it_keeps_one_herd_in_a_directory(herd: Herd) -> None:
    with started(herd) as up:
        welcome(up)
        code, line = refused(herd)
        assert code == 4
        assert line.startswith(f"vmherd: vmherd is up in {herd.path} already:")


def test_settings_that_are_there_win(herd: Herd) -> None:
    with started(herd) as up:
        welcome(up)
    before = settings_file(herd, "qemu").read_bytes()
    with started(herd, "--accelerator", "tcg") as up:
        welcome(up)
        up.terminate()
        _, errors = up.communicate(timeout=END_TIMEOUT_S)
    assert errors.startswith("vmherd: --accelerator tcg has no effect:")
    assert settings_file(herd, "qemu").read_bytes() == before


def test_grpc_on_tcp_needs_the_token(herd: Herd) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with started(herd, "--grpc", address) as up:
        assert address in welcome(up)
        with grpc.insecure_channel(address) as channel:
            instances = ControllerServiceStub(channel)
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                instances.List(ListRequest(), timeout=5)
            metadata = [("authorization", f"Bearer {herd.token.read_text().strip()}")]
            assert list(instances.List(ListRequest(), timeout=5, metadata=metadata).instances) == []


def test_a_stale_address_of_an_earlier_run_is_not_believed(herd: Herd) -> None:
    herd.gateway_address.write_text("127.0.0.1:1\n")
    with started(herd) as up:
        assert "127.0.0.1:1/" not in welcome(up)


@pytest.mark.parametrize("option", ["--bridge=br/0", "--subnet=10.0.0.1/24"])
def test_a_network_that_makes_no_sense_leaves_nothing_behind(herd: Herd, option: str) -> None:
    code, line = refused(herd, option)
    assert code == 2
    assert line.startswith(f"vmherd: {option.partition('=')[0]} must ")
    assert list(herd.path.iterdir()) == []


def test_a_network_without_root_names_what_to_do(cli: Cli, rundir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    result = cli("up", "--subnet", "10.20.30.0/24")
    assert (result.exit_code, result.stdout) == (7, "")
    assert result.stderr.startswith("vmherd: --subnet: only root can make networks; start it as root, or without")
    assert list(rundir.iterdir()) == []


@needs_root
@pytest.mark.usefixtures("builtin_image")
def test_a_network_whose_server_cannot_reach_its_files_names_what_to_do(rundir: Path) -> None:
    with own_network(), started(Herd(rundir / "run"), "--subnet", "10.77.0.0/24") as up:
        assert up.wait(END_TIMEOUT_S) == 1
        assert up.stderr
        last = up.stderr.read().splitlines()[-1]
    assert last.startswith("vmherd: dnsmasq, which is not root, cannot reach ")
    assert f"`chmod o+x {rundir}`" in last


def test_a_taken_port_is_refused_before_anything_is_written(herd: Herd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, line = refused(herd, "--http", address)
    assert code == 4
    assert line == f"vmherd: cannot listen on {address}: Address already in use; choose another address with --http"
    assert list(herd.path.iterdir()) == []


def test_a_flag_that_has_no_effect_is_told_before_what_the_settings_say_fails(herd: Herd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        prepare(herd, herd.path / "state", Flags(http=address))
        code, (ignored, failed) = refused_at_length(herd, "--http", "127.0.0.1:0")
    assert code == 4
    assert ignored.startswith("vmherd: --http 127.0.0.1:0 has no effect:")
    assert failed.endswith(f"Address already in use; choose another address in {settings_file(herd, 'gateway')}")


@pytest.mark.parametrize(
    ("spoil", "code", "text"),
    [
        (lambda herd: settings_file(herd, "qemu").write_text("{"), 2, "settings/qemu.json:1:2: not JSON"),
        (lambda herd: settings_file(herd, "gateway").write_text('{"x": 1}'), 2, "unknown field 'x'"),
        (lambda herd: herd.logs.touch(), 4, "logs: not a directory"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    herd: Herd, spoil: Callable[[Herd], object], code: int, text: str
) -> None:
    herd.settings.mkdir()
    spoil(herd)
    found_code, line = refused(herd)
    assert found_code == code
    assert text in line


def test_a_directory_too_deep_for_sockets_is_refused(herd: Herd) -> None:
    code, line = refused(Herd(herd.path / ("d" * 100)))
    assert code == 4
    assert "choose a shorter run directory" in line
    assert list(herd.path.iterdir()) == []


def test_an_address_that_is_none_leaves_nothing_behind(herd: Herd) -> None:
    code, line = refused(Herd(herd.path / "run"), "--http", "8080")
    assert code == 2
    assert line.startswith("vmherd: --http must be HOST:PORT")
    assert list(herd.path.iterdir()) == []


@pytest.mark.parametrize("process", ["qemu", "controller", "gateway"])
def test_a_process_without_its_settings_says_so(process: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmherd", process, "--settings", str(tmp_path / "none.json")],
        capture_output=True,
        text=True,
        timeout=END_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"vmherd: cannot read the settings file {tmp_path}/none.json: No such file or directory\n"


def _command(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return words[words.index("vmherd") + 1]
