"""Running programs and copying files with the tools of a full distribution at the other end, from the command line."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S
from tests.framework.herd import HerdUnderTest

pytestmark = [pytest.mark.timeout(TEST_TIMEOUT_S), pytest.mark.usefixtures("as_found")]

COMMAND_TIMEOUT_S = 180.0


def popen(herd: HerdUnderTest, *words: str, **fields: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vmherd", "--rundir", str(herd.directory), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **fields)


def vmherd(herd: HerdUnderTest, *words: str, data: bytes = b"", exit_code: int = 0) -> bytes:
    """Runs the command line, which must exit with this code, and gives what it wrote."""
    with popen(herd, *words, stdin=subprocess.PIPE) as process:
        stdout, stderr = process.communicate(data, timeout=COMMAND_TIMEOUT_S)
    assert process.returncode == exit_code, stderr.decode()
    return stdout


def execute(herd: HerdUnderTest, script: str, **fields: Any) -> bytes:
    return vmherd(herd, "exec", "web", "--", "sh", "-c", script, **fields)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_output_beyond_what_the_agent_keeps(debian: HerdUnderTest) -> None:
    size_bytes = 20 << 20
    output = execute(debian, f"head --bytes={size_bytes} /dev/urandom | tee /var/tmp/output")
    assert len(output) == size_bytes
    assert debian.shell("sha256sum /var/tmp/output && rm /var/tmp/output").split()[0] == sha256(output)


def test_standard_input_and_both_outputs(debian: HerdUnderTest) -> None:
    data = os.urandom(1 << 20)
    assert execute(debian, "sha256sum; exit 7", data=data, exit_code=7).split()[0].decode() == sha256(data)
    with popen(debian, "exec", "web", "--", "sh", "-c", "echo out; echo err >&2", stdin=subprocess.DEVNULL) as process:
        assert process.communicate(timeout=COMMAND_TIMEOUT_S) == (b"out\n", b"err\n")


def test_ctrl_c_ends_the_command_in_the_guest(debian: HerdUnderTest) -> None:
    with popen(debian, "exec", "web", "--", "sh", "-c", "echo begun; exec sleep 4321", stdin=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"begun\n"  # while it still runs
        assert debian.shell("pgrep --full --exact 'sleep 4321' | wc --lines") == "1\n"
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=COMMAND_TIMEOUT_S)
        assert run.returncode == 128 + signal.SIGINT
    debian.eventually(lambda: debian.shell("pgrep --full --exact 'sleep 4321' || true") == "")


def test_a_command_that_a_signal_ends(debian: HerdUnderTest) -> None:
    execute(debian, "kill -s TERM $$", exit_code=128 + signal.SIGTERM)


def test_a_detached_command(debian: HerdUnderTest) -> None:
    processes = "/v1/instances/web/processes"
    started = debian.http.post(processes, json={"command": ["sh", "-c", "echo begun; exec sleep 4321"]}).json()
    assert [each["id"] for each in debian.http.get(processes).json()["processes"]] == [started["id"]]
    assert debian.http.get(f"{processes}/{started['id']}").json()["state"] == "RUNNING"
    assert f"{started['pid']} " in debian.shell("pgrep --full --exact --list-full 'sleep 4321'")
    debian.http.post(f"{processes}/{started['id']}/signal", json={"signal": 9})
    debian.eventually(lambda: debian.http.get(f"{processes}/{started['id']}").json()["state"] == "EXITED")
    assert debian.http.get(f"{processes}/{started['id']}").json()["signal"] == 9
    with debian.http.stream("GET", f"{processes}/{started['id']}/follow") as response:
        events = [json.loads(line) for line in response.iter_lines()]
    assert "".join(event["result"].get("output", {}).get("text", "") for event in events) == "begun\n"
    assert debian.http.delete(f"{processes}/{started['id']}").status_code == 200


def make_tree(top: Path) -> None:
    """A folder with what copies often get wrong."""
    (top / "empty").mkdir(parents=True)
    (top / "deep/er").mkdir(parents=True)
    (top / "deep/er/data").write_bytes(os.urandom(3 << 20))
    (top / "with space and 'quotes\"").write_text("odd")
    (top / "-starts-with-a-dash").write_text("dash")
    (top / "käse 🧀").write_text("umlaut")
    (top / "line\nend").write_text("line end")
    (top / "script").write_text("#!/bin/sh\n")
    (top / "script").chmod(0o750)
    (top / "relative-link").symlink_to("deep/er/data")
    (top / "dangling-link").symlink_to("not there")
    (top / "sparse").touch()
    os.truncate(top / "sparse", 1 << 20)


def listing(top: Path) -> dict[str, tuple[str, object]]:
    """What a folder holds: kinds, modes and contents."""
    found: dict[str, tuple[str, object]] = {}
    for path in sorted(top.rglob("*")):
        mode = oct(path.lstat().st_mode)
        content = os.readlink(path) if path.is_symlink() else sha256(path.read_bytes()) if path.is_file() else None
        found[str(path.relative_to(top))] = (mode, content)
    return found


def test_a_folder_there_and_back(debian: HerdUnderTest, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    vmherd(debian, "cp", "-r", str(tmp_path / "tree"), "web:/var/tmp/there")
    sums = debian.shell("cd /var/tmp/there && find . -type f -print0 | sort --zero-terminated | xargs -0 sha256sum -z")
    told = dict(line.split("  ./", 1)[::-1] for line in sums.split("\0") if line)
    local = {name: content for name, (_, content) in listing(tmp_path / "tree").items()}
    assert told == {name: local[name] for name in told}
    assert len(told) == 7
    assert debian.shell("readlink /var/tmp/there/relative-link /var/tmp/there/dangling-link").splitlines() == [
        "deep/er/data",
        "not there",
    ]
    vmherd(debian, "cp", "-r", "web:/var/tmp/there", str(tmp_path / "back"))
    assert listing(tmp_path / "back") == listing(tmp_path / "tree")
    # A link that leads out of the folder would lead somewhere else here.
    debian.shell("ln --symbolic /etc/shadow /var/tmp/there/out")
    with popen(debian, "cp", "-r", "web:/var/tmp/there", str(tmp_path / "again")) as copying:
        _, stderr = copying.communicate(timeout=COMMAND_TIMEOUT_S)
    assert (copying.returncode, b"out: a link" in stderr) == (1, True), stderr
    assert listing(tmp_path / "again") == listing(tmp_path / "tree")
    debian.shell("rm -r /var/tmp/there")


def test_a_file_there_and_back(debian: HerdUnderTest, tmp_path: Path) -> None:
    file = tmp_path / "file with space"
    file.write_bytes(os.urandom(24 << 20))
    file.chmod(0o640)
    vmherd(debian, "cp", str(file), "web:/var/tmp/")
    assert debian.shell("stat --format='%a %s' '/var/tmp/file with space'") == f"640 {24 << 20}\n"
    assert debian.shell("sha256sum </var/tmp/'file with space'").split()[0] == sha256(file.read_bytes())
    vmherd(debian, "cp", "web:/var/tmp/file with space", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert (tmp_path / "back").stat().st_mode == file.stat().st_mode
    assert vmherd(debian, "cp", "web:/var/tmp/file with space", "-") == file.read_bytes()
    debian.shell("rm /var/tmp/'file with space'")
