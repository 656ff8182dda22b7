from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vmherd.qemu.network.rules import Port
from vmherd.qemu.process import (
    Process,
    find_processes,
    open_pidfd,
    read_record,
    start_ticks,
    stderr_tail,
    write_record,
)

PORTS = (
    Port("office", "vm0123456789a0", "52:54:00:12:34:56", "10.20.30.2"),
    Port("lab", "vm0123456789a1", "52:54:00:12:34:57"),
)
RUNS = Process("uid", "name", 1, ("qemu", "a b", ""), 1900000002, "boot", 1.5, PORTS, pid=7, start_ticks=9)


@pytest.mark.parametrize(
    "process",
    [
        RUNS,
        replace(RUNS, pid=None, start_ticks=None),
        replace(RUNS, ended_at_s=2.5, exit_code=0, stderr_tail="last\nlines"),
        replace(RUNS, ended_at_s=2.5, signal=9),
    ],
)
def test_a_record_comes_back_as_it_was(tmp_path: Path, process: Process) -> None:
    path = tmp_path / "process.json"
    write_record(path, RUNS)
    write_record(path, process)
    assert read_record(path) == process
    assert os.listdir(tmp_path) == ["process.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": "7"},
        {"pid": 0},
        {"pid": -1},
        {"pid": 2**70},
        {"uid": None},
        {"argv": None},
        {"argv": 5},
        {"unix_uid": None},
        {"ports": None},
        {"ports": [{}]},
        {"ports": [{"network": "office", "device": "eth0"}]},
        {"generation": 1.5},
        {"started_at_s": "now"},
        {"unknown": 1},
    ],
)
def test_a_record_with_a_wrong_value_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "process.json"
    path.write_text(json.dumps(asdict(RUNS) | changes))
    with pytest.raises(ValueError, match=r"not a process|wrong type|no pid"):
        read_record(path)


def test_a_start_time_is_read_past_any_name(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (2"
    shutil.copy("/bin/sleep", program)
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    before = time.clock_gettime(time.CLOCK_BOOTTIME) * ticks_per_s
    with subprocess.Popen([program, "60"]) as process:
        ticks = start_ticks(process.pid)
        after = time.clock_gettime(time.CLOCK_BOOTTIME) * ticks_per_s
        process.kill()
    assert ticks is not None
    assert before - 1 <= ticks <= after + 1
    assert start_ticks(process.pid) is None


def test_a_pidfd_is_given_for_the_right_start_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        ticks = start_ticks(process.pid)
        assert ticks is not None
        pidfd = open_pidfd(process.pid, ticks)
        assert pidfd is not None
        os.close(pidfd)
        assert open_pidfd(process.pid, ticks - 1) is None
        assert open_pidfd(process.pid, None) is None
        process.kill()
    assert open_pidfd(process.pid, ticks) is None
    assert open_pidfd(process.pid, None) is None


def test_a_pid_that_became_a_thread_s_is_no_process() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        assert open_pidfd(thread.native_id, 1) is None
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("before", [(), ("/bin/sh", "-c", 'echo; read line; "$@"', "sh")])
def test_a_process_is_found_by_the_end_of_its_command_line(before: tuple[str, ...]) -> None:
    argv, users = ("/bin/sh", "-c", "echo; read line", "a b", ""), {os.geteuid()}
    with subprocess.Popen((*before, *argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the kernel shows a command line a moment after the start
        assert find_processes(argv, users) == [(start_ticks(process.pid), process.pid)]
        for others in (argv[:-1], (*argv, ""), ("in/sh", *argv[1:])):
            assert find_processes(others, users) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has processes of other users")
def test_a_stranger_with_the_same_command_line_is_not_taken_for_the_process() -> None:
    argv = ("/bin/sh", "-c", "echo; read line", "stranger")
    stranger = subprocess.Popen(argv, user=65533, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        assert find_processes(argv, {65532}) == []
        assert [pid for _, pid in find_processes(argv, {65532, 65533})] == [stranger.pid]


def test_a_record_is_nobody_else_s_to_read(tmp_path: Path) -> None:
    write_record(tmp_path / "process.json", RUNS)
    assert (tmp_path / "process.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("written", "tail"),
    [
        (b"", ""),
        (b"one\ntwo\n", "one\ntwo"),
        (b"".join(b"%d\n" % i for i in range(100)), "\n".join(map(str, range(80, 100)))),
        (b"x" * 10_000, "x" * 4096),
        (b"\x1b[31mred\x07\xff\r\n", "\ufffd[31mred\ufffd\ufffd"),
    ],
)
def test_the_tail_is_short_and_printable(tmp_path: Path, written: bytes, tail: str) -> None:
    path = tmp_path / "stderr.log"
    path.write_bytes(written)
    assert stderr_tail(path) == tail
    path.unlink()
    assert stderr_tail(path) == ""


def test_a_tail_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert stderr_tail(tmp_path) == ""
