"""What `cp` makes of its words, with a guest that is a dict."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest
from rich.console import Console

from vmherd.cli import copying
from vmherd.cli.copying import Place, place
from vmherd.guest_agent.files import FileDescription, FileDigest
from vmherd.model.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, VmherdError


class Guest:
    """The files of a guest: bytes, or None for a folder."""

    def __init__(self, **files: bytes | None) -> None:
        self.files: dict[str, bytes | None] = {"/": None, **{f"/{name}": data for name, data in files.items()}}
        self.modes: dict[str, int | None] = {}
        self.sizes: dict[str, int | None] = {}
        self.breaks_off = False

    def describe(self, path: str) -> FileDescription:
        path = path.rstrip("/") or "/"
        if path not in self.files:
            raise NotFound("no such file", reason="GUEST_FILE_NOT_FOUND")
        return FileDescription(path, is_folder=self.files[path] is None, mode=0o4754)

    def read(self, path: str, *, archive: bool) -> Generator[FileDescription | bytes | FileDigest]:
        data = self.files[path]
        assert data is not None
        yield self.describe(path)
        yield data
        if self.breaks_off:
            raise Aborted("the guest is gone")
        yield FileDigest(len(data), "0", verified=True)

    def write(
        self, path: str, pieces: Iterable[bytes], *, archive: bool, mode: int | None, size_bytes: int | None
    ) -> FileDigest:
        data = b"".join(pieces)
        self.files[path], self.modes[path], self.sizes[path] = data, mode, size_bytes
        return FileDigest(len(data), "0", verified=True)


def send(source: str | Path, target: str, guest: Guest, *, recursive: bool = False) -> None:
    copying.copy(place(str(source)), Place(target, is_guest=True), guest, recursive=recursive)


def fetch(source: str, target: str | Path, guest: Guest, *, recursive: bool = False) -> None:
    copying.copy(Place(source, is_guest=True), place(str(target)), guest, recursive=recursive)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web:/etc/hosts", Place("/etc/hosts", is_guest=True, guest="web")),
        ("web:/", Place("/", is_guest=True, guest="web")),
        ("web:/a:b\nc", Place("/a:b\nc", is_guest=True, guest="web")),
        (":/etc/hosts", Place("/etc/hosts", is_guest=True)),
        ("win:C:\\x", Place("C:\\x", is_guest=True, guest="win")),
        ("file", Place("file", is_guest=False)),
        ("./web:/etc", Place("./web:/etc", is_guest=False)),
        ("/a:/b", Place("/a:/b", is_guest=False)),
        ("Web:/x", Place("Web:/x", is_guest=False)),
        ("-", Place("-", is_guest=False)),
    ],
)
def test_places(text: str, expected: Place) -> None:
    assert place(text) == expected


@pytest.mark.parametrize("text", ["web:", "web:etc", ":x", "web:~/x"])
def test_a_path_in_a_guest_is_absolute(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"\./"):
        place(text)


@pytest.mark.parametrize(
    ("target", "path"), [("/", "/here"), ("/folder", "/folder/here"), ("/folder/", "/folder/here"), ("/new", "/new")]
)
def test_where_a_file_goes(tmp_path: Path, target: str, path: str) -> None:
    (tmp_path / "here").write_bytes(b"data")
    (tmp_path / "here").chmod(0o604)
    guest = Guest(folder=None)
    send(tmp_path / "here", target, guest)
    assert (guest.files[path], guest.modes[path], guest.sizes[path]) == (b"data", 0o604, 4)


def test_a_file_without_a_size_of_its_own() -> None:
    guest = Guest()
    send("/proc/version", "/v", guest)
    assert guest.sizes["/v"] is None
    assert guest.files["/v"]


def test_a_folder_is_meant_by_a_slash(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    with pytest.raises(NotFound, match="no folder /none/"):
        send(tmp_path / "here", "/none/", Guest())


def test_a_file_out_of_a_guest(tmp_path: Path) -> None:
    guest = Guest(f=b"new")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("old")
    for target, file in (("folder", "folder/f"), ("new", "new"), ("link", "old")):
        fetch("/f", tmp_path / target, guest)
        assert (tmp_path / file).read_bytes() == b"new"
        assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o754  # and never a special bit
    assert (tmp_path / "link").is_symlink()


def test_a_copy_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    guest = Guest(f=b"new")
    guest.breaks_off = True
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(Aborted, match="gone"):
        fetch("/f", tmp_path / "f", guest)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"old"}


def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        fetch("/f", tmp_path / "pipe", Guest(f=b"data"))
        assert os.read(reader, 10) == b"data"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(("target", "kind"), [("none/f", NotFound), ("file/f", FailedPrecondition)])
def test_a_place_here_that_cannot_be_written(tmp_path: Path, target: str, kind: type[VmherdError]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(kind):
        fetch("/f", tmp_path / target, Guest(f=b""))


def test_a_folder_takes_r(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="add -r"):
        send(tmp_path, "/", Guest())


def test_a_bar_on_a_terminal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch("/f", tmp_path / "f", Guest(f=b"data"))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(copying, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    guest = Guest()
    guest.files["/odd[red]\n"] = b"data"
    fetch("/odd[red]\n", tmp_path / "f", guest)
    out, err = capsys.readouterr()
    assert out == ""
    assert "/odd[red]" in err
    assert "4/?" in err or "bytes" in err
