from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.framework.fake_controller import FakeController, fake_controller
from vmherd.cli import traces
from vmherd.cli.app import app
from vmherd.image.registry import KernelImage
from vmherd.model.layout import Herd

Cli = Callable[..., Result]
Up = subprocess.Popen[str]

END_TIMEOUT_S = 30.0
LAST_LINE = "Ctrl-C ends the three processes."


@pytest.fixture
def rundir() -> Iterator[Path]:
    # Short, because the path of a socket is; pytest's own directories are long.
    with tempfile.TemporaryDirectory(prefix="vh-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def controller(rundir: Path) -> Iterator[FakeController]:
    with fake_controller(Herd(rundir).controller_socket) as fake:
        yield fake


@pytest.fixture
def cli(rundir: Path) -> Cli:
    """Runs the command line as a user would, on the test's own run directory."""

    def run(*args: str, input: bytes | None = None) -> Result:
        return CliRunner().invoke(app, ["--rundir", str(rundir), *args], input=input, catch_exceptions=False)

    return run


@pytest.fixture
def herd(rundir: Path, builtin_image: KernelImage) -> Iterator[Herd]:
    """A run directory where nothing must be left at the end. The guest is in the cache, so `up` does not build it."""
    yield Herd(rundir)
    left = list(traces.all_of(Herd(rundir)))
    for pid in traces.processes(rundir):
        os.kill(pid, signal.SIGKILL)
    assert left == []


@contextmanager
def started(herd: Herd, *options: str) -> Iterator[Up]:
    up = subprocess.Popen(
        [sys.executable, "-m", "vmherd", "up", "--rundir", str(herd.path), "--http", "127.0.0.1:0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with up:
        try:
            yield up
        finally:
            up.terminate()
            up.communicate(timeout=END_TIMEOUT_S)


def welcome(up: Up) -> str:
    """What it prints up to the line that says it is ready."""
    assert up.stdout
    lines = []
    for line in up.stdout:
        lines.append(line)
        if line.strip() == LAST_LINE:
            return "".join(lines)
    assert up.stderr
    pytest.fail(f"it ended before it was ready: {up.stderr.read()}")
