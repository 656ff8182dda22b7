from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.framework.fake_controller import FakeController
from tests.integration.cli.conftest import Cli
from vmherd.api.v1.process_pb2 import (
    ExecRequest,
    Process,
    ProcessEvent,
    ProcessOutput,
    RunRequest,
    SignalProcessRequest,
)
from vmherd.cli.exec import INPUT_AHEAD_MAX_BYTES
from vmherd.model.errors import Unavailable

TIMEOUT_S = 30.0


@pytest.fixture(autouse=True)
def instance(controller: FakeController) -> None:
    controller.add("web")


def output(data: bytes, stream: ProcessOutput.Stream.ValueType = ProcessOutput.STDOUT) -> ProcessEvent:
    return ProcessEvent(output=ProcessOutput(stream=stream, text=data.decode(errors="replace"), raw=data))


def ended(exit_code: int = 0, **fields: str) -> ProcessEvent:
    return ProcessEvent(process=Process(state=Process.EXITED, exit_code=exit_code, **fields))


@contextmanager
def running(rundir: Path, *words: str, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """The real program, which the input of the test's own process has nothing to do with."""
    line = [sys.executable, "-m", "vmherd", "--rundir", str(rundir), *words]
    with subprocess.Popen(line, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        try:
            yield process
        finally:
            process.kill()


def run_of(controller: FakeController) -> RunRequest:
    [request] = controller.requests
    assert isinstance(request, RunRequest)
    return request


def test_exec_passes_the_words_as_they_are(cli: Cli, controller: FakeController) -> None:
    result = cli("exec", "web", "--env", "A=1", "--timeout", "5", "--", "ls", "-l", "--json", "a b")
    assert result.exit_code == 0
    request = run_of(controller)
    assert request.command == ["ls", "-l", "--json", "a b"]
    assert request.environment == {"A": "1"}
    assert request.timeout.seconds == 5
    assert request.input == b""


def test_exec_has_no_timeout_of_its_own(cli: Cli, controller: FakeController) -> None:
    cli("exec", "web", "--", "true")
    assert not run_of(controller).HasField("timeout")


def test_exec_gives_output_and_exit_code_of_the_command(cli: Cli, controller: FakeController) -> None:
    controller.events = [output(b"\xff\x00"), output("ä".encode(), ProcessOutput.STDERR), ended(42)]
    result = cli("exec", "web", "--", "cat")
    assert (result.exit_code, result.stdout_bytes, result.stderr_bytes) == (42, b"\xff\x00", "ä".encode())


def test_exec_says_what_is_not_as_asked(cli: Cli, controller: FakeController) -> None:
    controller.events = [ProcessEvent(notice="no shell\x1b[2J"), ended()]
    assert cli("exec", "web", "--", "true").stderr == "vmherd: no shell\ufffd[2J\n"


def test_exec_as_json_is_one_event_a_line(cli: Cli, controller: FakeController) -> None:
    controller.events = [output(b"out"), ended(3)]
    result = cli("exec", "web", "--json", "--", "false")
    assert result.exit_code == 3
    first, last = map(json.loads, result.stdout.splitlines())
    assert first["output"]["text"] == "out"
    assert last["process"]["exitCode"] == 3


def test_exec_without_an_agent_says_so(cli: Cli, controller: FakeController) -> None:
    controller.errors["RunRequest"] = Unavailable("the guest agent of 'web' is not connected")
    result = cli("exec", "web", "--", "true")
    assert (result.exit_code, result.stderr) == (5, "vmherd: the guest agent of 'web' is not connected\n")


def test_exec_sends_input_that_is_there_at_once_along(rundir: Path, controller: FakeController, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\x00file")
    with (
        (tmp_path / "in").open("rb") as file,
        running(rundir, "exec", "web", "--", "cat", stdin=file.fileno()) as exec_,
    ):
        assert exec_.wait(TIMEOUT_S) == 0
    assert run_of(controller).input == b"\x00file"
    assert controller.told == []


def test_exec_forwards_input_as_it_comes(rundir: Path, controller: FakeController) -> None:
    controller.events = [output(b"ready"), ended()]
    with running(rundir, "exec", "web", "--", "cat", stdin=subprocess.PIPE) as exec_:
        assert exec_.stdin
        assert exec_.stdout
        assert exec_.stdout.read(5) == b"ready"
        exec_.stdin.write(b"x" * 3_000_000)
        exec_.stdin.close()
        assert exec_.wait(TIMEOUT_S) == 0
    assert b"".join(request.input for request in controller.told) == b"x" * 3_000_000
    assert controller.told[-1] == ExecRequest(input=b"")


def test_exec_without_stdin_leaves_ours_alone(rundir: Path, controller: FakeController) -> None:
    with running(rundir, "exec", "web", "-n", "--", "cat", stdin=subprocess.PIPE) as exec_:
        assert exec_.wait(TIMEOUT_S) == 0
    assert controller.told == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_exec_has_the_command_ended(
    rundir: Path, controller: FakeController, number: signal.Signals
) -> None:
    controller.events = [output(b"on"), ended(143)]
    controller.holds_exec = True
    with running(rundir, "exec", "web", "--", "sleep", "60") as exec_:
        assert exec_.stdout
        assert exec_.stdout.read(2) == b"on"
        exec_.send_signal(number)
        assert exec_.wait(TIMEOUT_S) == 128 + number
        assert exec_.stderr
        assert exec_.stderr.read() == b""
    assert [request.HasField("end") for request in controller.told] == [True]


def test_an_interruption_waits_behind_little_input_that_the_command_does_not_take(
    rundir: Path, controller: FakeController
) -> None:
    controller.events = [output(b"on"), ended(143)]
    controller.takes_input = False

    def told_bytes() -> int:
        return sum(len(request.input) for request in controller.told)

    with running(rundir, "exec", "web", "--", "sleep", "60", stdin=subprocess.PIPE) as exec_:
        assert exec_.stdin
        assert exec_.stdout
        assert exec_.stdout.read(2) == b"on"
        os.set_blocking(exec_.stdin.fileno(), False)
        # Full is what takes nothing for a while after it has passed on as much as it ever does.
        while (room := select.select([], [exec_.stdin], [], 1)[1]) or told_bytes() < INPUT_AHEAD_MAX_BYTES:
            if room:
                exec_.stdin.write(b"x" * 65_536)
        exec_.send_signal(signal.SIGINT)
        assert exec_.wait(TIMEOUT_S) == 130
    *inputs, last = controller.told
    assert last.HasField("end")
    assert INPUT_AHEAD_MAX_BYTES <= sum(len(request.input) for request in inputs) < 2 * INPUT_AHEAD_MAX_BYTES


def test_a_second_interruption_leaves_at_once(rundir: Path, controller: FakeController) -> None:
    controller.events = [output(b"x" * (1 << 20)), ended()]
    controller.holds_exec = True
    with running(rundir, "exec", "web", "--", "sleep", "60") as exec_:
        assert exec_.stdout
        exec_.stdout.read(1)  # the rest fills the pipe, and waits for a reader
        exec_.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            exec_.wait(0.5)  # what comes sooner could be one with the first
        exec_.send_signal(signal.SIGINT)
        assert exec_.wait(TIMEOUT_S) == 130


def test_exec_whose_output_nobody_reads_ends_as_by_a_broken_pipe(rundir: Path, controller: FakeController) -> None:
    controller.events = [output(b"on"), *[output(b"x" * 100_000)] * 20, ended()]
    controller.holds_exec = True
    with running(rundir, "exec", "web", "--", "yes") as exec_:
        assert exec_.stdout
        exec_.stdout.read(2)
        exec_.stdout.close()
        assert exec_.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
        assert exec_.stderr
        assert exec_.stderr.read() == b""


def test_exec_whose_output_has_no_room_says_so(rundir: Path, controller: FakeController) -> None:
    controller.events = [output(b"x\n"), ended()]
    words = [sys.executable, "-m", "vmherd", "--rundir", str(rundir), "exec", "web", "--", "yes"]
    with open("/dev/full", "wb") as full:
        exec_ = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, check=False)
    assert exec_.returncode == 4
    assert exec_.stderr.splitlines() == [
        b"vmherd: the command was ended, for its output cannot be written here: No space left on device"
    ]


def test_options_of_the_command_come_after_two_hyphens(cli: Cli) -> None:
    result = cli("exec", "web", "uname", "-a")
    assert result.exit_code == 2
    assert "put `--` before the command" in result.stderr


def test_a_detached_command_is_known_by_its_id(cli: Cli, controller: FakeController) -> None:
    assert cli("exec", "web", "--detach", "--", "sleep", "60").stdout == "00000000\n"
    controller.page_size_max = 1
    cli("exec", "web", "-d", "--", "echo", "a b")
    lines = cli("ps", "web").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ID", "00000000", "00000001"]
    assert lines[2].endswith("echo 'a b'")
    assert [json.loads(line)["id"] for line in cli("process", "list", "web", "--json").stdout.splitlines()] == [
        "00000000",
        "00000001",
    ]


def test_follow_shows_output_and_exits_as_the_command_did(cli: Cli, controller: FakeController) -> None:
    cli("exec", "web", "-d", "--", "false")
    controller.events = [output(b"out"), ended(7, reason="its time was up")]
    result = cli("process", "follow", "web", "00000000")
    assert (result.exit_code, result.stdout) == (7, "out")
    assert result.stderr == "vmherd: process 00000000 exited (7): its time was up\n"


def test_a_lost_command_has_no_exit_code_to_give(cli: Cli, controller: FakeController) -> None:
    cli("exec", "web", "-d", "--", "false")
    controller.events = [ProcessEvent(process=Process(state=Process.LOST, reason="the instance was stopped"))]
    result = cli("process", "follow", "web", "00000000")
    assert (result.exit_code, result.stderr) == (1, "vmherd: process 00000000 lost: the instance was stopped\n")


@pytest.mark.parametrize(("text", "number"), [("KILL", 9), ("sigterm", 15), ("10", 10)])
def test_kill_takes_signals_as_people_write_them(cli: Cli, controller: FakeController, text: str, number: int) -> None:
    cli("exec", "web", "-d", "--", "false")
    assert cli("process", "kill", "web", "00000000", "-s", text).exit_code == 0
    request = controller.requests[-1]
    assert isinstance(request, SignalProcessRequest)
    assert request.signal == number


def test_kill_refuses_what_is_no_signal(cli: Cli, controller: FakeController) -> None:
    result = cli("process", "kill", "web", "00000000", "-s", "NONSENSE")
    assert result.exit_code == 2
    assert "wants a signal such as TERM or 15" in result.stderr


def test_delete_forgets_a_command(cli: Cli, controller: FakeController) -> None:
    cli("exec", "web", "-d", "--", "false")
    assert cli("process", "delete", "web", "00000000", "--force").exit_code == 0
    assert controller.processes == {}
