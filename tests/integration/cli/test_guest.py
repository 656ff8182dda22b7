from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.framework.fake_controller import FakeController
from tests.integration.cli.conftest import Cli
from vmherd.api.v1.process_pb2 import RunResponse
from vmherd.model.errors import Unavailable


@pytest.fixture(autouse=True)
def instance(controller: FakeController) -> None:
    controller.add("web")


def test_exec_passes_the_words_as_they_are(cli: Cli, controller: FakeController) -> None:
    result = cli("exec", "web", "--env", "A=1", "--timeout", "5", "--", "ls", "-l", "--json", "a b")
    assert result.exit_code == 0
    (request,) = controller.requests
    assert request.command == ["ls", "-l", "--json", "a b"]  # type: ignore[attr-defined]
    assert request.environment == {"A": "1"}  # type: ignore[attr-defined]
    assert request.timeout.seconds == 5  # type: ignore[attr-defined]
    assert request.input == b""  # type: ignore[attr-defined]


def test_exec_gives_the_output_and_the_exit_code_of_the_command(cli: Cli, controller: FakeController) -> None:
    controller.run_answer = RunResponse(exit_code=42, stdout="out\n", stderr="err\n")
    result = cli("exec", "web", "--", "false")
    assert (result.exit_code, result.stdout, result.stderr) == (42, "out\n", "err\n")


def test_exec_gives_the_exact_bytes(cli: Cli, controller: FakeController) -> None:
    controller.run_answer = RunResponse(stdout="\ufffd\ufffd", stdout_raw=b"\xff\x00", stderr="ä")
    result = cli("exec", "web", "--", "cat")
    assert result.stdout_bytes == b"\xff\x00"
    assert result.stderr_bytes == "ä".encode()


def test_exec_says_when_output_is_missing(cli: Cli, controller: FakeController) -> None:
    controller.run_answer = RunResponse(stdout="x", stdout_truncated=True)
    result = cli("exec", "web", "--", "yes")
    assert "there was more" in result.stderr


def test_exec_reads_its_input_from_a_file_or_from_ours(cli: Cli, controller: FakeController, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\x00file")
    cli("exec", "web", "--input", str(tmp_path / "in"), "--", "cat")
    cli("exec", "web", "--input", "-", "--", "cat", input=b"ours\xff")
    assert [request.input for request in controller.requests] == [b"\x00file", b"ours\xff"]  # type: ignore[attr-defined]


def test_exec_as_json_is_the_whole_answer(cli: Cli, controller: FakeController) -> None:
    controller.run_answer = RunResponse(exit_code=3, stdout="out")
    result = cli("exec", "web", "--json", "--", "false")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert (document["exitCode"], document["stdout"], document["stderr"]) == (3, "out", "")


def test_exec_without_an_agent_says_so(cli: Cli, controller: FakeController) -> None:
    controller.errors["RunRequest"] = Unavailable("the guest agent of 'web' is not connected")
    result = cli("exec", "web", "--", "true")
    assert result.exit_code == 5
    assert result.stderr == "vmherd: the guest agent of 'web' is not connected\n"
