"""Files of a real guest, copied through its agent: by `vmherd cp`, over gRPC and over HTTP."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from tests.framework.herd import HerdUnderTest, reason
from vmherd.api.v1.file_pb2 import ReadFileRequest, WriteFileHeader, WriteFileRequest
from vmherd.api.v1.file_pb2_grpc import FileServiceStub
from vmherd.cli.app import app
from vmherd.cli.exit_codes import FAILED, NOT_FOUND, OK, STATE, USAGE
from vmherd.model.errors import Aborted, DeadlineExceeded

Cp = Callable[..., Result]

CALL_TIMEOUT_S = 60.0
NOISE = random.Random(3).randbytes(3 << 20)  # more than ten chunks


@pytest.fixture(scope="module")
def herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    shared_herd.launch()
    return shared_herd


@pytest.fixture(autouse=True)
def nothing_left(herd: HerdUnderTest) -> Iterator[None]:
    """Every test has a folder of its own in the guest, and leaves no open file and no unfinished one there."""
    herd.shell("mkdir /tmp/t")
    handles = open_files(herd)
    yield
    herd.eventually(lambda: open_files(herd) == handles)
    find = "find / -xdev -name '.vmherd-*' 2>/dev/null; find /tmp -name '.vmherd-*' 2>/dev/null"  # while it may go
    herd.eventually(lambda: herd.run("sh", "-c", find)["stdout"] == "")
    herd.shell("rm -rf /tmp/t")


@pytest.fixture
def cp(herd: HerdUnderTest) -> Cp:
    """`vmherd cp`."""

    def run(*args: str | Path, input: bytes | None = None) -> Result:
        words = ["--rundir", str(herd.directory), "cp", *map(str, args)]
        return CliRunner().invoke(app, words, input=input, catch_exceptions=False)

    return run


def open_files(herd: HerdUnderTest) -> int:
    """How many descriptors the agent has, which has more while it runs a program: so this asks until it is quiet."""
    count = "pid=$(pidof qemu-ga); set -- /proc/${pid%% *}/fd/*; echo $#"
    return min(int(herd.shell(count)) for _ in range(3))


def test_a_file_there_and_back(cp: Cp, herd: HerdUnderTest, tmp_path: Path) -> None:
    here, back = tmp_path / "noise", tmp_path / "back"
    here.write_bytes(NOISE)
    here.chmod(0o750)
    assert cp(here, "web:/tmp/t/noise").exit_code == OK
    assert herd.shell("stat -c %a /tmp/t/noise; sha256sum </tmp/t/noise").split()[:2] == [
        "750",
        hashlib.sha256(NOISE).hexdigest(),
    ]
    result = cp("web:/tmp/t/noise", back)
    assert (result.exit_code, result.output) == (OK, "")
    assert back.read_bytes() == NOISE
    assert stat.S_IMODE(back.stat().st_mode) == 0o750


def test_a_copy_over_a_file_keeps_its_owner_and_link(cp: Cp, herd: HerdUnderTest, tmp_path: Path) -> None:
    herd.shell("cd /tmp/t; echo old >f; chown 12:34 f; ln -s f link")
    here = tmp_path / "here"
    here.write_text("new\n")
    here.chmod(0o604)
    assert cp(here, "web:/tmp/t/link").exit_code == OK
    assert herd.shell("cd /tmp/t; readlink link; cat f; stat -c '%u %g %a' f") == "f\nnew\n12 34 604\n"


@pytest.mark.parametrize(
    "name", ["plain", "with space", "quote'\"$(x)", "new\nline", "-rf", "a:b", "ünïcode", "back\\slash"]
)
def test_any_name(cp: Cp, tmp_path: Path, name: str) -> None:
    here, back = tmp_path / name, tmp_path / "back"
    here.write_text(name)
    assert cp(here, "web:/tmp/t").exit_code == OK
    assert cp(f"web:/tmp/t/{name}", back).exit_code == OK
    assert back.read_text() == name


def test_an_empty_file(cp: Cp, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cp(tmp_path / "empty", "web:/tmp/t/empty").exit_code == OK
    assert cp("web:/tmp/t/empty", tmp_path / "back").exit_code == OK
    assert (tmp_path / "back").read_bytes() == b""


def test_a_file_without_a_size(cp: Cp, tmp_path: Path) -> None:
    result = cp("web:/proc/version", tmp_path / "version")
    assert result.exit_code == OK
    assert (tmp_path / "version").read_text().startswith("Linux version")
    assert result.stderr == "vmherd: not verified: the file has no size of its own\n"


def test_standard_input_and_output(cp: Cp) -> None:
    assert cp("-", "web:/tmp/t/f", input=b"piped\0").exit_code == OK
    result = cp("web:/tmp/t/f", "-")
    assert (result.exit_code, result.stdout_bytes) == (OK, b"piped\0")


def test_a_folder_there_and_back(cp: Cp, herd: HerdUnderTest, tmp_path: Path) -> None:
    here = tmp_path / "house"
    (here / "room" / "empty").mkdir(parents=True)
    (here / "room" / ("long" * 40)).write_bytes(NOISE[:300_000])
    (here / "script").write_text("#!/bin/sh\n")
    (here / "script").chmod(0o755)
    (here / "link").symlink_to("room")
    os.link(here / "script", here / "twin")
    here.chmod(0o751)
    assert cp("-r", here, "web:/tmp/t").exit_code == OK
    assert herd.shell("cd /tmp/t; stat -c %a house house/script; readlink house/link") == "751\n755\nroom\n"
    result = cp("-r", "web:/tmp/t/house", tmp_path / "back")
    assert (result.exit_code, result.output) == (OK, "")
    assert tree(tmp_path / "back") == tree(here)
    # A folder that is there is merged into, and keeps its mode.
    assert cp("-r", f"{here}/.", "web:/tmp/t").exit_code == OK
    assert herd.shell("cd /tmp/t; ls; stat -c %a .") == "house\nlink\nroom\nscript\ntwin\n755\n"


def tree(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    return {
        str(path.relative_to(folder)): (
            stat.S_IMODE(path.lstat().st_mode),
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "",
        )
        for path in [folder, *folder.rglob("*")]
    }


def test_a_folder_as_an_archive(cp: Cp, herd: HerdUnderTest, tmp_path: Path) -> None:
    herd.shell("cd /tmp/t; mkdir a; echo 1 >a/b")
    result = cp("-r", "web:/tmp/t/a", "-")
    (tmp_path / "a.tar").write_bytes(result.stdout_bytes)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert sorted(tar.getnames()) == [".", "./b"]
    assert cp("-r", "-", "web:/tmp/t/again", input=result.stdout_bytes).exit_code == OK
    assert herd.shell("cat /tmp/t/again/b") == "1\n"


def test_what_is_left_out_is_named(cp: Cp, herd: HerdUnderTest, tmp_path: Path) -> None:
    herd.shell("cd /tmp/t; mkdir a; ln -s /etc/passwd a/out; ln -s ../../b a/up; ln -s f a/in; echo 1 >a/f; mkfifo a/p")
    result = cp("-r", "web:/tmp/t/a", tmp_path / "a")
    assert result.exit_code == FAILED
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["f", "in"]
    assert "left out: out: a link that leads out of the folder, to /etc/passwd" in result.stderr
    assert "left out: p: not a file, a folder or a link" in result.stderr
    assert len(result.stderr.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["web:/tmp/none", "."], NOT_FOUND, "No such file or directory"),
        (["web:/etc", "."], STATE, "folder"),
        (["web:/tmp/t/fifo", "."], STATE, "neither a file nor a folder"),
        (["{here}", "web:/none/f"], NOT_FOUND, "No such file or directory"),
        (["{here}", "web:/tmp/none/"], NOT_FOUND, "no folder /tmp/none/"),
        (["{here}", "web:/etc/hosts/f"], STATE, "Not a directory"),
        (["{here}", "web:/tmp/t/fifo"], STATE, "neither a file nor a folder"),
        (["{here}", "web:relative"], USAGE, "absolute"),
        (["{here}", "/tmp"], USAGE, "one of SOURCE and TARGET"),
        (["{here}", ":/tmp"], USAGE, "which guest"),
        (["{here}", "nobody:/tmp"], NOT_FOUND, "nobody"),
        (["nobody:/tmp", "."], NOT_FOUND, "nobody"),
        (["{here}/none", "web:/tmp"], STATE, "Not a directory"),
        (["/none", "web:/tmp"], NOT_FOUND, "/none"),
        (["{dir}", "web:/tmp"], STATE, "add -r"),
        (["-r", "{dir}", "web:/etc/hosts"], STATE, "File exists"),
        (["-r", "{dir}", "web:/none/dir"], NOT_FOUND, "No such file"),
        (["web:/etc/hosts", "/none/f"], NOT_FOUND, "/none"),
        (["-r", "web:/etc", "{here}"], STATE, "no folder"),
    ],
)
def test_what_cannot_be(cp: Cp, herd: HerdUnderTest, tmp_path: Path, words: list[str], code: int, text: str) -> None:
    herd.shell("mkfifo /tmp/t/fifo")
    (tmp_path / "here").touch()
    result = cp(*(word.format(here=tmp_path / "here", dir=tmp_path) for word in words))
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.output
    assert text in result.stderr


def test_a_guest_without_room(cp: Cp, herd: HerdUnderTest, tmp_path: Path) -> None:
    herd.shell("mkdir /tmp/t/small; mount -t tmpfs -o size=1m none /tmp/t/small")
    (tmp_path / "noise").write_bytes(NOISE)
    result = cp(tmp_path / "noise", "web:/tmp/t/small")
    assert herd.shell("ls -A /tmp/t/small; umount /tmp/t/small") == ""
    assert result.exit_code == STATE
    assert "No space left on device" in result.stderr


def test_a_file_that_changes_while_it_is_read(herd: HerdUnderTest) -> None:
    herd.shell("head -c 3000000 /dev/zero >/tmp/t/log")

    def read_while_it_grows() -> None:
        with herd.client() as client:
            for number, _ in enumerate(client.files.ReadFile(ReadFileRequest(name="web", path="/tmp/t/log"))):
                if number == 1:
                    herd.shell("echo more >>/tmp/t/log")

    with pytest.raises(Aborted, match="changed while it was read") as caught:
        read_while_it_grows()
    assert caught.value.reason == "GUEST_FILE_CHANGED"


def test_a_copy_that_is_cancelled_leaves_nothing(herd: HerdUnderTest) -> None:
    """The fixture looks for what is left."""
    herd.shell("head -c 8000000 /dev/zero >/tmp/t/big")
    with grpc.insecure_channel(f"unix:{herd.files.controller_socket}") as channel:
        stub = FileServiceStub(channel)
        for request in (
            ReadFileRequest(name="web", path="/tmp/t/big"),
            ReadFileRequest(name="web", path="/tmp/t", archive=True),
        ):
            reading = stub.ReadFile(request, timeout=CALL_TIMEOUT_S)
            assert next(reading).description.path
            assert next(reading).data
            reading.cancel()

        began, end = threading.Event(), threading.Event()

        def parts() -> Iterator[WriteFileRequest]:
            yield WriteFileRequest(header=WriteFileHeader(name="web", path="/tmp/t/new"))
            yield WriteFileRequest(data=NOISE)
            began.set()
            end.wait(CALL_TIMEOUT_S)

        writing = stub.WriteFile.future(parts())
        assert began.wait(CALL_TIMEOUT_S)
        herd.eventually(lambda: ".vmherd-" in herd.shell("ls -A /tmp/t"))
        writing.cancel()
        end.set()
    herd.eventually(lambda: herd.shell("ls -A /tmp/t") == "big\n")


def test_a_deadline_is_honoured(herd: HerdUnderTest) -> None:
    end = threading.Event()

    def parts() -> Iterator[WriteFileRequest]:
        yield WriteFileRequest(header=WriteFileHeader(name="web", path="/tmp/t/new"))
        end.wait(CALL_TIMEOUT_S)

    with herd.client() as client, pytest.raises(DeadlineExceeded) as caught:
        client.files.WriteFile(parts(), timeout=5)
    end.set()
    assert caught.value.reason == "COPY_UNFINISHED"


def test_others_are_heard_in_the_middle_of_a_copy(herd: HerdUnderTest) -> None:
    herd.shell("head -c 8000000 /dev/zero >/tmp/t/big")
    with herd.client() as client:
        parts = client.files.ReadFile(ReadFileRequest(name="web", path="/tmp/t/big"))
        assert next(parts).description.size_bytes == 8_000_000
        assert herd.shell("echo hello") == "hello\n"  # nobody reads the copy meanwhile
        assert sum(len(part.data) for part in parts) == 8_000_000


def test_over_http(herd: HerdUnderTest) -> None:
    files = "/v1/instances/web/files"
    answer = herd.http.put(files, params={"path": "/tmp/t/naïve.bin", "mode": "0640"}, content=NOISE)
    assert answer.status_code == 200, answer.text
    assert answer.json()["digest"] == {
        "sizeBytes": str(len(NOISE)),
        "sha256": hashlib.sha256(NOISE).hexdigest(),
        "verified": True,
        "notice": "",
    }
    answer = herd.http.get(files, params={"path": "/tmp/t/naïve.bin"})
    assert answer.content == NOISE
    head = herd.http.head(files, params={"path": "/tmp/t/naïve.bin"})
    names = ("content-type", "content-length", "content-disposition", "last-modified", "vmherd-mode")
    assert [head.headers[name] for name in names] == [answer.headers[name] for name in names]
    assert answer.headers["vmherd-mode"] == "0640"
    herd.shell("mkdir /tmp/t/a; echo 1 >/tmp/t/a/b")
    archive = herd.http.get(files, params={"path": "/tmp/t/a", "archive": "tar"}).content
    assert herd.http.put(files, params={"path": "/tmp/t/c", "archive": "tar"}, content=archive).status_code == 200
    assert herd.shell("cat /tmp/t/c/b") == "1\n"


@pytest.mark.parametrize(
    ("method", "path", "code", "why"),
    [
        ("GET", "/tmp/none", 404, "GUEST_FILE_NOT_FOUND"),
        ("HEAD", "/tmp/none", 404, ""),
        ("GET", "/tmp", 400, "GUEST_FILE_UNSUITABLE"),
        ("HEAD", "/tmp", 400, ""),
        ("GET", "relative", 400, "INVALID_ARGUMENT"),
        ("PUT", "/tmp/none/f", 404, "GUEST_FILE_NOT_FOUND"),
        ("PUT", "/tmp", 400, "GUEST_FILE_UNSUITABLE"),
    ],
)
def test_what_cannot_be_over_http(herd: HerdUnderTest, method: str, path: str, code: int, why: str) -> None:
    content = NOISE if method == "PUT" else None
    answer = herd.http.request(method, "/v1/instances/web/files", params={"path": path}, content=content)
    assert answer.status_code == code, answer.text
    assert not why or reason(answer) == why
