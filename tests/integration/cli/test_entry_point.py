"""The program itself, as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tests.framework.fake_controller import FakeController
from vmherd.cli.app import app
from vmherd.cli.exit_codes import MEANINGS
from vmherd.cli.main import main
from vmherd.cli.serve import PROCESSES

TIMEOUT_S = 30.0


def vmherd(*args: str, executable: tuple[str, ...] = ("-m", "vmherd")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *executable, *args], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    done = vmherd("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for word in ("launch", "exec", "plan", "up", "gateway"):
        assert f" {word} " in done.stdout
    for code, meaning in MEANINGS.items():
        assert f"{code}  {meaning}" in done.stdout


def test_every_command_has_its_help() -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        if name not in PROCESSES:
            result = CliRunner().invoke(app, [name, "--help"], catch_exceptions=False)
            assert result.exit_code == 0
            assert f"Usage: vmherd {name}" in result.stdout
            assert command.help


def test_without_a_command_it_shows_the_help_and_fails() -> None:
    done = vmherd()
    assert done.returncode == 2
    assert "Usage: vmherd" in done.stdout


def test_a_command_and_its_exit_code(rundir: Path, controller: FakeController) -> None:
    controller.add("web")
    assert "web" in vmherd("list", "--rundir", str(rundir)).stdout
    failed = vmherd("info", "nobody", "--rundir", str(rundir))
    assert failed.returncode == 3
    assert failed.stderr.count("\n") == 1


def test_arguments_that_are_not_utf8_are_refused(rundir: Path, controller: FakeController) -> None:
    done = vmherd("info", "\udcff", "--rundir", str(rundir))
    assert (done.returncode, done.stderr) == (2, "vmherd: not UTF-8: '\\udcff'\n")
    assert controller.requests == []


def test_a_name_that_the_terminal_cannot_show_is_no_failure(rundir: Path, controller: FakeController) -> None:
    controller.add("web", labels={"note": "ä"})
    done = subprocess.run(
        [sys.executable, "-m", "vmherd", "list", "--rundir", str(rundir)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert "note=\\xe4" in done.stdout


def test_ctrl_c_during_a_launch_says_that_it_goes_on(rundir: Path, controller: FakeController) -> None:
    controller.holds_waits = True
    launch = [sys.executable, "-m", "vmherd", "launch", "web", "--rundir", str(rundir)]
    with subprocess.Popen(launch, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stderr.readline().startswith("process")
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "vmherd: no longer waiting; web goes on starting\n"
        assert process.wait(TIMEOUT_S) == 130


def test_a_reader_that_leaves_early_causes_no_traceback(rundir: Path, controller: FakeController) -> None:
    for index in range(2000):
        controller.add(f"web-{index}", labels={"note": "x" * 200})
    done = subprocess.run(
        ["/bin/sh", "-c", f"'{sys.executable}' -m vmherd --rundir {rundir} list | head -n 1"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout.startswith("NAME")
    assert done.stderr == ""


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "sqlite3", "qemu.qmp", "vmherd.controller", "vmherd.qemu"])
def test_list_does_not_load_what_the_processes_need(rundir: Path, controller: FakeController, module: str) -> None:
    program = f"import sys; from vmherd.cli.main import main\ntry: main()\nfinally: print({module!r} in sys.modules)"
    done = vmherd("list", "--rundir", str(rundir), executable=("-c", program))
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    "module", ["typer", "pydantic", "fastapi", "vmherd.image", "vmherd.client", "vmherd.controller"]
)
def test_the_helper_does_not_load_what_it_does_not_need(tmp_path: Path, module: str) -> None:
    program = (
        "import sys; from vmherd.cli.main import main; import vmherd.qemu.app\n"
        "try: main()\n"
        f"finally: print({module!r} in sys.modules)"
    )
    done = vmherd("qemu", "--settings", str(tmp_path / "none"), executable=("-c", program))
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_ctrl_c_before_everything_is_loaded_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "vmherd.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "vmherd.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["vmherd", "list"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 130
