from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from vmherd.cli.logging import configure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_lines_are_json_where_nobody_looks() -> None:
    stream = io.StringIO()
    configure("info", stream)
    structlog.get_logger().info("serving", listen="/r/qemu.sock")
    line = json.loads(stream.getvalue())
    assert (line["event"], line["listen"], line["level"]) == ("serving", "/r/qemu.sock", "info")
    assert line["timestamp"].endswith("Z")


def test_libraries_write_into_the_same_log() -> None:
    stream = io.StringIO()
    configure("info", stream)
    logging.getLogger("uvicorn").warning("%d bytes", 5)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"]) == ("5 bytes", "warning")


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_a_traceback_shows_no_values(make: type[io.StringIO]) -> None:
    stream = make()
    configure("info", stream)
    token = "a-secret"
    try:
        raise ValueError(len(token))
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "ValueError" in stream.getvalue()
    assert "a-secret" not in stream.getvalue()


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    configure("warning", stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("library").info("quiet")
    assert stream.getvalue() == ""


def test_people_get_no_json() -> None:
    stream = Terminal()
    configure("info", stream)
    structlog.get_logger().info("serving")
    assert "serving" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(stream.getvalue())
