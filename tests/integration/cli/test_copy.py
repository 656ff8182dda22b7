"""`vmherd cp` against a fake controller: words in, requests and files out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.framework.fake_controller import FakeController
from tests.integration.cli.conftest import END_TIMEOUT_S
from vmherd.api.v1.file_pb2 import ReadFileRequest, WriteFileHeader
from vmherd.cli.exit_codes import INTERRUPTED, NOT_FOUND, OK, STATE, USAGE
from vmherd.model.errors import ResourceExhausted

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def web(controller: FakeController) -> None:
    controller.add("web")


def test_a_file_in(cli: Cli, controller: FakeController, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"data")
    (tmp_path / "f").chmod(0o600)
    result = cli("cp", str(tmp_path / "f"), "web:/")
    assert (result.exit_code, result.output) == (OK, "")
    assert controller.files["/f"] == b"data"
    assert controller.requests == [
        ReadFileRequest(name="web", path="/", describe_only=True),
        WriteFileHeader(name="web", path="/f", mode=0o600, size_bytes=4),
    ]


def test_a_file_out(cli: Cli, controller: FakeController, tmp_path: Path) -> None:
    controller.files["/f"] = b"data"
    assert cli("cp", "web:/f", str(tmp_path)).exit_code == OK
    assert (tmp_path / "f").read_bytes() == b"data"
    result = cli("cp", "web:/f", "-")
    assert (result.exit_code, result.stdout_bytes) == (OK, b"data")


def test_what_is_printed(cli: Cli, controller: FakeController) -> None:
    controller.file_notice = "not verified:\x1b[2J because"
    result = cli("cp", "-", "web:/f", input=b"data")
    assert (result.exit_code, result.stdout) == (OK, "")
    assert result.stderr == "vmherd: not verified:\N{REPLACEMENT CHARACTER}[2J because\n"
    result = cli("cp", "--json", "-", "web:/f", input=b"data")
    sha256 = hashlib.sha256(b"data").hexdigest()
    assert json.loads(result.stdout) == {
        "sizeBytes": "4",
        "sha256": sha256,
        "verified": True,
        "notice": controller.file_notice,
    }
    result = cli("cp", "--json", "web:/f", "-")
    assert result.stdout_bytes == b"data"
    assert json.loads(result.stderr)["sha256"] == sha256


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["nobody:/f", "."], NOT_FOUND, "no instance"),
        (["-", "nobody:/f"], NOT_FOUND, "no instance"),
        (["web:/none", "."], NOT_FOUND, "No such file"),
        (["/none", "web:/f"], NOT_FOUND, "/none: No such file or directory"),
        (["web:f", "."], USAGE, "absolute"),
        (["a", "b"], USAGE, "one of SOURCE and TARGET"),
        (["web:/a", "web:/b"], USAGE, "one of SOURCE and TARGET"),
        (["web:/a"], USAGE, "TARGET"),
    ],
)
def test_what_cannot_be(cli: Cli, words: list[str], code: int, text: str) -> None:
    result = cli("cp", *words, input=b"data")
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.output
    assert text in result.stderr


def test_an_error_of_the_controller(cli: Cli, controller: FakeController) -> None:
    controller.errors["WriteFileHeader"] = ResourceExhausted("no space left", reason="GUEST_FULL")
    result = cli("cp", "-", "web:/f", input=bytes(1 << 20))
    assert (result.exit_code, result.stderr) == (STATE, "vmherd: no space left\n")
    assert controller.files.keys() == {"/"}


def test_a_source_that_cannot_be_read_to_its_end(cli: Cli, controller: FakeController) -> None:
    result = cli("cp", "/proc/self/mem", "web:/f")
    assert result.exit_code == STATE
    assert "Input/output error" in result.stderr
    assert controller.files.keys() == {"/"}


@pytest.mark.parametrize(("source", "target", "total"), [("noise", "web:/f", "3.0"), ("web:/noise", ".", "?")])
def test_a_bar_on_a_terminal(
    rundir: Path, controller: FakeController, tmp_path: Path, source: str, target: str, total: str
) -> None:
    controller.files["/noise"] = bytes(3 << 20)
    (tmp_path / "noise").write_bytes(bytes(3 << 20))
    terminal, its_end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "vmherd", "--rundir", str(rundir), "cp", source, target],
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=its_end,
    ) as cp:
        os.close(its_end)
        shown = b""
        with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as file:  # EIO once nobody writes
            while piece := file.read(1 << 16):
                shown += piece
        assert cp.wait(END_TIMEOUT_S) == OK
        assert cp.stdout
        assert cp.stdout.read() == b""
    assert b"noise" in shown
    assert f"3.0/{total} MiB".encode() in shown
    assert shown.endswith((b"\x1b[2K", b"\x1b[?25h")), shown[-40:]  # the bar is gone


def test_an_interrupted_copy(rundir: Path, controller: FakeController) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "vmherd", "--rundir", str(rundir), "cp", "-", "web:/f"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as cp:
        assert cp.stdin
        cp.stdin.write(b"data")
        cp.stdin.flush()
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while not controller.requests:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        cp.send_signal(signal.SIGINT)
        assert cp.wait(END_TIMEOUT_S) == INTERRUPTED
        assert cp.stderr
        assert cp.stderr.read() in (b"", b"\n")
    assert controller.files.keys() == {"/"}
