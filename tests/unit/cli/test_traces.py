from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmherd.cli import traces
from vmherd.cli.herd_files import Flags, prepare
from vmherd.model.layout import Herd


@pytest.fixture
def herd() -> Iterator[Herd]:
    with tempfile.TemporaryDirectory(prefix="vh-", dir="/tmp") as directory:
        yield Herd(Path(directory))


def test_what_is_there_for_the_next_start_is_no_trace(herd: Herd) -> None:
    prepare(herd, herd.path / "state", Flags())
    for name in ("state/store.sqlite", "state/store.sqlite-wal", "state/accelerators.json", "state/images/a/kernel"):
        path = herd.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (herd.logs / "qemu.log").touch()
    (herd.path / "instances").mkdir()
    assert list(traces.all_of(herd)) == []


@contextmanager
def waiting(argument: str) -> Iterator[int]:
    """A process that waits and has this argument; gives its pid."""
    with subprocess.Popen(
        ["sh", "-c", "echo; read line", argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_process_is_found_by_its_command_line(herd: Herd) -> None:
    with waiting(f"{herd.path}/none") as pid:
        assert traces.processes(herd.path) == {pid: "sh"}
        assert list(traces.all_of(herd)) == [f"process {pid} (sh)"]
    assert traces.processes(herd.path) == {}


def test_a_process_is_found_by_a_file_that_it_has_open(herd: Herd) -> None:
    path = herd.path / "disk.raw"
    with path.open("w") as file:
        # Another name than the one on the command line, and none in the directory any more.
        with subprocess.Popen(["sleep", "60"], stdin=file) as process:
            path.unlink()
            assert traces.processes(herd.path) == {process.pid: "sleep"}
            process.kill()
        assert traces.processes(herd.path) == {}  # our own does not count


def test_a_process_of_a_directory_with_a_longer_name_is_not_ours(herd: Herd) -> None:
    with waiting(f"{herd.path}-other/none"):
        assert traces.processes(herd.path) == {}


def test_a_socket_is_found_even_without_its_file(herd: Herd) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{herd.path}/qemu.sock")
        server.listen()
        assert list(traces.all_of(herd)) == [f"socket {herd.path}/qemu.sock", f"file {herd.path}/qemu.sock"]
        Path(f"{herd.path}/qemu.sock").unlink()
        assert list(traces.all_of(herd)) == [f"socket {herd.path}/qemu.sock"]
    assert list(traces.all_of(herd)) == []


def test_the_disk_and_the_records_of_an_instance_are_traces(herd: Herd) -> None:
    for name in ("state/instances/x/disk.raw", "instances/x/process.json"):
        path = herd.path / name
        path.parent.mkdir(parents=True)
        path.touch()
    assert list(traces.all_of(herd)) == [
        f"file {herd.path}/instances/x/process.json",
        f"file {herd.path}/state/instances/x/disk.raw",
    ]


def test_the_loopback_is_an_interface() -> None:
    assert "interface lo" in traces.interfaces()
