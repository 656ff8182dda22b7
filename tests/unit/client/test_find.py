from __future__ import annotations

from pathlib import Path

import pytest

from vmherd.client import find_controller, own_run_directory, own_state_directory
from vmherd.model.errors import Unavailable


def make_socket(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    socket = directory / "controller.sock"
    socket.touch()
    return socket


@pytest.mark.parametrize(
    ("environ", "uid", "run_directory", "state_directory"),
    [
        ({"HOME": "/h", "XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/vmherd", "/var/lib/vmherd"),
        ({"HOME": "/h", "XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7/vmherd", "/h/.local/state/vmherd"),
        ({"HOME": "/h"}, 7, "/h/.local/state/vmherd/run", "/h/.local/state/vmherd"),
        ({"HOME": "/h", "XDG_RUNTIME_DIR": ""}, 7, "/h/.local/state/vmherd/run", "/h/.local/state/vmherd"),
    ],
)
def test_own_directories(environ: dict[str, str], uid: int, run_directory: str, state_directory: str) -> None:
    assert own_run_directory(environ, uid) == Path(run_directory)
    assert own_state_directory(environ, uid) == Path(state_directory)


def test_a_named_run_directory_comes_before_all_others(tmp_path: Path) -> None:
    named = make_socket(tmp_path / "named")
    other = make_socket(tmp_path / "other")
    environ = {"VMHERD_RUNDIR": str(other.parent), "HOME": str(tmp_path)}
    assert find_controller(named.parent, environ, 7) == named
    assert find_controller(None, environ, 7) == other


def test_a_named_run_directory_is_the_only_one_looked_in(tmp_path: Path) -> None:
    make_socket(tmp_path / ".local/state/vmherd/run")
    with pytest.raises(Unavailable, match=f"in {tmp_path}/none; start one with"):
        find_controller(tmp_path / "none", {"HOME": str(tmp_path)}, 7)


def test_an_empty_variable_names_nothing(tmp_path: Path) -> None:
    socket = make_socket(tmp_path / ".local/state/vmherd/run")
    assert find_controller(None, {"VMHERD_RUNDIR": "", "HOME": str(tmp_path)}, 7) == socket


def test_the_login_session_comes_before_the_home_directory(tmp_path: Path) -> None:
    home = make_socket(tmp_path / ".local/state/vmherd/run")
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "session")}
    assert find_controller(None, environ, 7) == home
    session = make_socket(tmp_path / "session/vmherd")
    assert find_controller(None, environ, 7) == session


def test_the_socket_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = make_socket(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert find_controller(Path("here"), {}, 7) == socket


def test_nothing_found_names_every_place(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "session")}
    with pytest.raises(Unavailable) as raised:
        find_controller(None, environ, 7)
    assert raised.value.reason == "CONTROLLER_NOT_FOUND"
    for place in ("/run/vmherd", f"{tmp_path}/session/vmherd", f"{tmp_path}/.local/state/vmherd/run"):
        assert place in raised.value.message
