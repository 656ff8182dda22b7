"""The unit and the image that run the proxy of a guest agent."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vmherd.cli.app import app

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "packaging/systemd/vmherd-agent-proxy@.service"
CONTAINERFILE = (ROOT / "packaging/Containerfile").read_text()
PROGRAM = "/usr/lib/vmherd/bin/vmherd"
PROGRAM_OF_THE_IMAGE = "/opt/vmherd/bin/vmherd"
TIMEOUT_S = 30.0
BUILD_TIMEOUT_S = 100.0
MAX_EXPOSURE = 10
"""Of 100. What is left is that it uses unix sockets and sees the host's files."""

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as folder:
        yield Path(folder)


def analyzed(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@needs_systemd
def test_systemd_understands_the_unit(folder: Path) -> None:
    unit = folder / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    done = analyzed("verify", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_the_unit_is_confined() -> None:
    done = analyzed("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", UNIT)
    assert done.returncode == 0, done.stdout


def test_the_units_command_serves_and_ends_well(folder: Path) -> None:
    [line] = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    program, *words = shlex.split(line.replace("${RUNTIME_DIRECTORY}", str(folder)))
    assert program == PROGRAM
    with subprocess.Popen(
        [sys.executable, "-m", "vmherd", *words],
        env=os.environ | {"VMHERD_AGENT_SOCKET": str(folder / "nothing.sock")},
        umask=0o177,
        stderr=subprocess.PIPE,
        text=True,
    ) as proxy:
        assert proxy.stderr
        assert "may connect" in proxy.stderr.readline()
        assert (folder / "agent.sock").is_socket()
        proxy.send_signal(signal.SIGTERM)
        assert proxy.wait(TIMEOUT_S) == 0
    assert list(folder.iterdir()) == []


def test_the_image_is_built_from_files_that_are_there(folder: Path) -> None:
    for words in re.findall(r"^COPY (?!--from)(.*)$", CONTAINERFILE, re.MULTILINE):
        *sources, target = words.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*"))
            else:
                shutil.copy(ROOT / source, folder / target)
    assert (folder / "constraints.txt").exists()
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert list((folder / "dist").glob("vmherd-*.whl"))


def instruction(name: str) -> list[str]:
    [found] = re.findall(rf"^{name} (\[.*\])$", CONTAINERFILE, re.MULTILINE)
    words: list[str] = json.loads(found)
    return words


def test_the_images_commands_are_the_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMHERD_AGENT_SOCKET", "/agent/agent.sock")
    program, *words = instruction("ENTRYPOINT") + instruction("CMD")
    assert program == PROGRAM_OF_THE_IMAGE
    served = CliRunner().invoke(app, [word.replace("/shared/", f"{folder}/no/") for word in words])
    assert "cannot listen on" in served.output + served.stderr

    health = re.sub(r"\\\n", "", CONTAINERFILE).split("HEALTHCHECK")[1].split("CMD ")[1].splitlines()[0]
    program, *words = json.loads(health)
    assert program == PROGRAM_OF_THE_IMAGE
    asked = CliRunner().invoke(app, [word.replace("/shared/", f"{folder}/") for word in words])
    assert f"there is no socket at {folder}/agent.sock" in asked.stderr


def test_the_image_has_no_registry_and_no_root() -> None:
    bases = re.findall(r"^FROM (\S+)", CONTAINERFILE, re.MULTILINE)
    assert set(bases) == {"debian:12-slim"}
    assert re.search(r"^USER [1-9]", CONTAINERFILE, re.MULTILINE)
