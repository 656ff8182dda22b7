"""What systemd's journal is sent, read back as it would read it."""

from __future__ import annotations

import array
import fcntl
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from vmherd.cli import journal
from vmherd.cli.journal import entry
from vmherd.cli.logging import configure

DEADLINE_S = 60.0


def parsed(data: bytes) -> Iterator[tuple[str, str]]:
    """The fields of an entry: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/"""
    while data:
        head, _, data = data.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            size = int.from_bytes(data[:8], "little")
            value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
            assert end == b"\n"
        yield name.decode(), value.decode()


class Journal:
    """The journal's socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.socket.settimeout(DEADLINE_S)

    def receive(self) -> dict[str, str]:
        data, ancillary, _, _ = self.socket.recvmsg(1 << 20, 1024)
        for _, _, descriptors in ancillary:
            [descriptor] = array.array("i", descriptors)
            with open(descriptor, "rb") as file:
                assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
                assert data == b""
                file.seek(0)
                data = file.read()
        return dict(parsed(data))


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TextIO]:
    """A stream that the journal reads."""
    with (tmp_path / "stderr").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        yield stream


@pytest.fixture
def the_journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as directory:
        it = Journal(f"{directory}/socket")
        monkeypatch.setattr(journal, "SOCKET", it.path)
        with it.socket:
            yield it


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_line_reaches_the_journal_with_its_fields(the_journal: Journal, stderr: TextIO) -> None:
    configure("info", stderr, identifier="vmherd-qemu")
    structlog.get_logger().warning("machine refused", uid="6a1e", name="web", pid=5, why='a "b"')
    assert the_journal.receive() == {
        "MESSAGE": r'machine refused uid="6a1e" name="web" pid=5 why="a \"b\""',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "vmherd-qemu",
        "VMHERD_UID": "6a1e",
        "VMHERD_NAME": "web",
        "VMHERD_PID": "5",
        "VMHERD_WHY": 'a "b"',
    }
    assert os.fstat(stderr.fileno()).st_size == 0


@pytest.mark.parametrize(("level", "priority"), [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3")])
def test_levels_are_priorities(the_journal: Journal, stderr: TextIO, level: str, priority: str) -> None:
    configure("debug", stderr)
    getattr(structlog.get_logger(), level)("said")
    assert the_journal.receive()["PRIORITY"] == priority


def test_libraries_write_into_the_journal_as_well(the_journal: Journal, stderr: TextIO) -> None:
    configure("info", stderr, identifier="vmherd-gateway")
    logging.getLogger("library").info("quiet %d\nand more", 1)
    assert the_journal.receive()["MESSAGE"] == "quiet 1\nand more"


def test_a_traceback_follows_its_message(the_journal: Journal, stderr: TextIO) -> None:
    configure("info", stderr)
    try:
        raise ValueError("wrong")
    except ValueError:
        structlog.get_logger().exception("failed", name="web")
    first, *traceback = the_journal.receive()["MESSAGE"].split("\n")
    assert first == 'failed name="web"'
    assert traceback[0].startswith("Traceback")
    assert traceback[-1] == "ValueError: wrong"


def test_a_guest_cannot_make_fields_of_its_own(the_journal: Journal, stderr: TextIO) -> None:
    configure("info", stderr)
    structlog.get_logger().info("guest said", text="x\nPRIORITY=0\nMESSAGE=all is well")
    received = the_journal.receive()
    assert received["PRIORITY"] == "6"
    assert received["VMHERD_TEXT"] == "x\nPRIORITY=0\nMESSAGE=all is well"
    assert "\n" not in received["MESSAGE"]


def test_what_is_no_text_is_spelled_out(the_journal: Journal, stderr: TextIO) -> None:
    configure("info", stderr)
    structlog.get_logger().info("half a \ud800", path="/r/\udcff", nobody=None)
    received = the_journal.receive()
    assert received["VMHERD_PATH"] == r"/r/\udcff"
    assert received["VMHERD_NOBODY"] == "null"
    assert received["MESSAGE"] == r'half a \ud800 path="/r/\udcff" nobody=null'


def test_what_no_datagram_has_room_for_arrives(the_journal: Journal, stderr: TextIO) -> None:
    configure("info", stderr)
    structlog.get_logger().info("much", text="x" * 10_000_000)
    assert the_journal.receive()["VMHERD_TEXT"] == "x" * 10_000_000


def test_without_a_journal_lines_go_where_they_went(stderr: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SOCKET", "/nonexistent/journal")
    configure("info", stderr)
    structlog.get_logger().info("still there", name="web")
    stderr.seek(0)
    line = json.loads(stderr.read())
    assert (line["event"], line["name"]) == ("still there", "web")


def test_a_journal_that_does_not_read_holds_up_nothing(the_journal: Journal, stderr: TextIO) -> None:
    configure("info", stderr)
    while os.fstat(stderr.fileno()).st_size == 0:
        structlog.get_logger().info("said")
    assert the_journal.receive()["MESSAGE"] == "said"


@pytest.mark.parametrize("stream", ["", "1:2", "journal"])
def test_a_stream_that_the_journal_does_not_read_is_left_as_it_is(
    the_journal: Journal, stderr: TextIO, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    configure("info", stderr)
    structlog.get_logger().info("said")
    stderr.seek(0)
    assert json.loads(stderr.read())["event"] == "said"


VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text())


@given(event=st.text(), fields=st.dictionaries(st.text(min_size=1), VALUES), traceback=st.text())
def test_every_line_is_one_entry(event: str, fields: dict[str, object], traceback: str) -> None:
    told = {"event": event, "level": "info", "timestamp": "now", "exception": traceback}
    (message, _), *others = parsed(entry(fields | told, "vmherd"))
    assert message == "MESSAGE"
    assert others[:2] == [("PRIORITY", "6"), ("SYSLOG_IDENTIFIER", "vmherd")]
    rest = {name: value for name, value in fields.items() if name not in told}
    assert len(others[2:]) == len(rest)
    assert all(re.fullmatch("VMHERD_[A-Z0-9_]{0,57}", name) for name, _ in others[2:])
    assert {value for value in rest.values() if isinstance(value, str)} <= {value for _, value in others[2:]}
