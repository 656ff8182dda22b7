"""Archives of a guest are hostile: whatever is in them, nothing outside of the folder changes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vmherd.cli import local_archives
from vmherd.cli.local_archives import pack, unpack
from vmherd.model.errors import Aborted, FailedPrecondition

Member = tuple[str, bytes, str]
"""Its name, its tar type, and where it leads or what it holds."""

FILE, LINK, HARD, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


def archive(*members: Member, mode: int = 0o644) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, rest in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, mode | (0o700 if kind == FOLDER else 0)
            content = rest.encode() if kind == FILE else b""
            member.size, member.linkname = len(content), "" if kind == FILE else rest
            tar.addfile(member, io.BytesIO(content))
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "members",
    [
        [("../f", FILE, "")],
        [("/f", FILE, "")],
        [("a/../../f", FILE, "")],
        [("..", FOLDER, "")],
        [("", FILE, "x")],
        [(".", FILE, "x")],
        [("l", LINK, "/tmp"), ("l/f", FILE, "")],
        [("l", LINK, "."), ("l/f", FILE, "")],
        [("l", LINK, "."), ("l", FILE, "")],
        [("l", LINK, ".."), ("l", LINK, ".")],
        [("a", FOLDER, ""), ("a/l", LINK, ".."), ("a/l/f", HARD, "x")],
    ],
)
def test_an_archive_that_would_change_something_else_is_refused_whole(tmp_path: Path, members: list[Member]) -> None:
    with pytest.raises(Aborted, match="nothing was unpacked"):
        unpack(archive(("first", FILE, ""), *members), tmp_path / "in")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "member",
    [
        ("l", LINK, "/etc/passwd"),
        ("l", LINK, ".."),
        ("a/l", LINK, "../../x"),
        ("l", LINK, "a/../.."),
        ("l", LINK, "a/b/../../.."),
        ("h", HARD, "../secret"),
        ("h", HARD, "/etc/passwd"),
        ("h", HARD, "none"),
        ("p", tarfile.FIFOTYPE, ""),
        ("d", tarfile.CHRTYPE, ""),
        ("b", tarfile.BLKTYPE, ""),
    ],
)
def test_what_leads_out_is_left_out_and_named(tmp_path: Path, member: Member) -> None:
    left_out = unpack(archive(("a", FOLDER, ""), ("a/f", FILE, "data"), member), tmp_path / "in")
    assert [line.partition(": ")[0] for line in left_out] == [member[0]]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["in", "in/a", "in/a/f"]


def test_links_that_stay_inside(tmp_path: Path) -> None:
    members = [
        ("a", FOLDER, ""),
        ("a/f", FILE, "data"),
        ("a/l", LINK, "../a/f"),
        ("h", HARD, "./a/f"),
        ("m", LINK, "a"),
    ]
    assert unpack(archive(*members), tmp_path / "in") == []
    assert (tmp_path / "in/m/l").read_text() == "data"
    assert (tmp_path / "in/h").samefile(tmp_path / "in/a/f")


def test_links_that_were_there_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("old")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/f").symlink_to(outside / "f")
    (tmp_path / "in/twin").hardlink_to(outside / "f")
    unpack(archive(("f", FILE, "new"), ("twin", FILE, "new")), tmp_path / "in")
    assert (outside / "f").read_text() == "old"
    (tmp_path / "in/a").symlink_to(outside)
    with pytest.raises(FailedPrecondition, match="is a link out of"):
        unpack(archive(("a", FOLDER, ""), ("a/f", FILE, "new")), tmp_path / "in")
    assert (outside / "f").read_text() == "old"


def test_modes_are_kept_within_reason(tmp_path: Path) -> None:
    unpack(archive(("f", FILE, ""), mode=0o7777), tmp_path / "in")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "in/f").stat().st_mode) == 0o777 & ~mask


def test_holes_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("f")
    header.type = tarfile.GNUTYPE_SPARSE
    header.size = 0
    with pytest.raises(Aborted):
        unpack(io.BytesIO(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), tmp_path / "in")


def test_a_size_that_has_not_arrived(tmp_path: Path) -> None:
    header = tarfile.TarInfo("f")
    header.size = 1 << 40
    with pytest.raises(Aborted, match="damaged"):
        unpack(io.BytesIO(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), tmp_path / "in")
    assert list(tmp_path.iterdir()) == []


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_archives, "MEMBERS_MAX", 2)
    with pytest.raises(Aborted, match="more than 2 members"):
        unpack(archive(("a", FILE, ""), ("b", FILE, ""), ("c", FILE, "")), tmp_path / "in")


names = st.sampled_from(["a", "b", "a/b", "a/b/c", "./a", "../x", "/x", "a/../x", "a//b", ".", "..", "b/..", "b/a"])
kinds = st.sampled_from([FILE, LINK, HARD, FOLDER])


def leads_in_circles(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@example(members=[("a", LINK, "a//b")], rounds=1)
@given(members=st.lists(st.tuples(names, kinds, names), max_size=8), rounds=st.integers(1, 2))
def test_nothing_outside_is_touched_or_reached(
    tmp_path_factory: pytest.TempPathFactory, members: list[Member], rounds: int
) -> None:
    top = tmp_path_factory.mktemp("top")
    (top / "x").write_text("secret")
    for _ in range(rounds):  # the second time into what the first has left
        with contextlib.suppress(Aborted, FailedPrecondition, OSError):
            unpack(archive(*members), top / "in")
    assert {path.name for path in top.iterdir()} <= {"x", "in"}
    assert (top / "x").read_text() == "secret"
    for path in (top / "in").rglob("*"):
        # A link into itself leads nowhere, and `realpath` makes up where.
        assert leads_in_circles(path) or os.path.realpath(path).startswith(str(top / "in")), path


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=2048))
def test_noise_is_no_archive(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("noise") / "in"
    try:
        assert unpack(io.BytesIO(data), folder) == []
        assert list(folder.iterdir()) == []
    except Aborted:
        assert not folder.exists()


def test_what_is_packed_can_be_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a" / ("long" * 50)).mkdir(parents=True)
    (source / "a" / "ünïcode\n").write_text("data")
    (source / "a" / "big").write_bytes(bytes(range(256)) * 3000)
    (source / "a" / "script").touch(mode=0o755)
    (source / "link").symlink_to("a")
    (source / "twin").hardlink_to(source / "a" / "big")
    os.mkfifo(source / "pipe")
    left_out: list[str] = []
    packed = b"".join(pack(source, left_out))
    assert left_out == ["pipe: not a file, a folder or a link"]
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {(member.uid, member.gid, member.uname, member.gname) for member in tar} == {(0, 0, "", "")}
    assert unpack(io.BytesIO(packed), tmp_path / "target") == []
    (source / "pipe").unlink()
    assert look(tmp_path / "target") == look(source)
    assert (tmp_path / "target/twin").samefile(tmp_path / "target/a/big")


def look(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def test_a_file_that_shrinks_while_it_is_packed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(3 * local_archives.PIECE_BYTES))
    pieces = pack(tmp_path, [])
    for _ in range(3):  # the headers of the folder and the file, and the first piece
        next(pieces)
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(FailedPrecondition, match="became shorter"):
        list(pieces)
