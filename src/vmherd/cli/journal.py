"""Log lines for systemd's journal, with their fields, so that `journalctl VMHERD_NAME=web` finds an instance's.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Mapping
from typing import Any, TextIO

SOCKET = "/run/systemd/journal/socket"
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog(3)."""

FIELD_NAME_MAX_LENGTH = 64

_NOT_IN_A_NAME = re.compile("[^A-Z0-9_]")
_TOLD_OTHERWISE = {"event", "level", "timestamp", "exception"}


def leads_to_journal(stream: TextIO) -> bool:
    """Whether the journal reads what is written to a stream: JOURNAL_STREAM of systemd.exec(5) names it."""
    with contextlib.suppress(OSError):
        status = os.fstat(stream.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def entry(line: Mapping[str, Any], identifier: str) -> bytes:
    """A log line as the journal takes it. The message shows the fields as well, as `journalctl` shows nothing else."""
    told = {name: value for name, value in line.items() if name not in _TOLD_OTHERWISE}
    shown = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in told.items())
    message = " ".join([line["event"], *shown])
    return b"".join(
        (
            _field("MESSAGE", "\n".join(filter(None, [message, line.get("exception")]))),
            _field("PRIORITY", str(PRIORITIES[line["level"]])),
            _field("SYSLOG_IDENTIFIER", identifier),
            *(_field(_name(name), _text(value)) for name, value in told.items()),
        )
    )


def _name(name: str) -> str:
    return f"VMHERD_{_NOT_IN_A_NAME.sub('_', name.upper())}"[:FIELD_NAME_MAX_LENGTH]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")
    if b"\n" in data:  # would begin another field
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


class JournalHandler(logging.Handler):
    """Sends lines, formatted as JSON, to the journal, and those that it does not take to another handler."""

    def __init__(self, identifier: str, otherwise: logging.Handler) -> None:
        super().__init__()
        self._identifier = identifier
        self._otherwise = otherwise
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Logs a record."""
        try:
            self._send(entry(json.loads(self.format(record)), self._identifier))
        except OSError:
            self._otherwise.handle(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Lets go of the journal."""
        self._socket.close()
        super().close()

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, SOCKET)
        except OSError as error:
            if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            self._send_as_file(data)

    def _send_as_file(self, data: bytes) -> None:
        """Sends what no datagram has room for in a file in memory, sealed so that the journal can rely on it."""
        with open(os.memfd_create("vmherd-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb") as file:
            file.write(data)
            file.flush()
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, file.fileno().to_bytes(4, "little"))
            self._socket.sendmsg([], [rights], 0, SOCKET)
