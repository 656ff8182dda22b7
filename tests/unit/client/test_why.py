"""What a user is told who may not connect."""

from __future__ import annotations

import errno
import grp
import os
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from vmherd.client import _client


class Guarded(socket.socket):
    def connect(self, address: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    ("mode", "hint"),
    [
        (0o660, "only members of the group {0} may connect: `adduser NAME {0}` as root, then log in anew"),
        (0o600, "only the user who started it may connect"),
    ],
)
def test_who_may_connect(mode: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "controller.sock"
    path.touch()
    path.chmod(mode)
    group = grp.getgrgid(path.stat().st_gid).gr_name
    monkeypatch.setattr(socket, "socket", Guarded)
    assert _client._why(path) == f"Permission denied; {hint.format(group)}"


def test_a_directory_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Guarded)
    assert _client._why(tmp_path / "none" / "controller.sock") == "Permission denied; ask its owner"
