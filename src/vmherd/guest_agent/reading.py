"""Finds what is waited for in the stream of bytes from an agent, in whatever pieces it comes; without any I/O."""

from __future__ import annotations

from collections.abc import Sequence
from mmap import mmap

from vmherd.guest_agent.wire import (
    DELIMITER,
    MAX_PLAIN_BYTES,
    Failure,
    Line,
    MalformedReply,
    Reply,
    Success,
    parse_reply,
)

_SYNC_REPLY_BYTES = 256
_QMP_GREETING = b'{"QMP"'


class LineDecoder:
    """Cuts a stream of bytes into lines, whatever pieces it comes in."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._line: bytearray | mmap = bytearray()
        self._size_bytes = 0

    @property
    def has_rest(self) -> bool:
        """Whether the beginning of a line has come and not its end."""
        return self._size_bytes > 0

    def feed(self, data: bytes) -> list[Line]:
        """Take in the next bytes and give the lines that they complete, without line ends and empty lines.

        Raises MalformedReply if a line is too long; the decoder is of no use after that.
        """
        lines: list[Line] = []
        *ends, rest = data.split(b"\n")
        for end in ends:
            if self._size_bytes:
                self._extend(end)
                lines.append(self._take())
            elif end:
                self._check(end)
                lines.append(end)
        if rest:
            self._extend(rest)
        return lines

    def _extend(self, piece: bytes) -> None:
        self._check(piece)
        self._size_bytes += len(piece)
        if isinstance(self._line, bytearray) and self._size_bytes > MAX_PLAIN_BYTES:
            # What grows step by step on the heap is moved now and then, and leaves holes as large as itself.
            room = mmap(-1, self._max_line_bytes)
            room.write(self._line)
            self._line = room
        if isinstance(self._line, bytearray):
            self._line += piece
        else:
            self._line.write(piece)

    def _take(self) -> Line:
        line, self._line = self._line, bytearray()
        if isinstance(line, mmap):
            line.resize(self._size_bytes)
        self._size_bytes = 0
        return line

    def _check(self, piece: bytes) -> None:
        if self._size_bytes + len(piece) > self._max_line_bytes:
            raise MalformedReply(f"a line of more than {self._max_line_bytes} bytes")


class SyncReader:
    """Finds the answer to `encode_sync(token)`: what comes after it belongs to us.

    Until then anything may come, for example the tail of another client's reply. All of it is skipped, however long a
    line is, and takes no memory.
    """

    def __init__(self, token: int) -> None:
        self._answer = Success(token, token)
        self._line = b""
        self.has_rest = False

    def feed(self, data: bytes) -> bool | None:
        """Take in the next bytes and tell whether the answer is among them; None if not.

        Raises MalformedReply where something else greets us that would never answer.
        """
        if data.startswith(_QMP_GREETING):
            raise MalformedReply("QEMU's monitor (QMP) listens here")
        *lines, rest = (self._line + data).split(b"\n")
        for number, line in enumerate(lines):
            if self._is_answer(_from_delimiter(line)):
                self.has_rest = bool(rest) or any(lines[number + 1 :])
                return True
        self._line = _from_delimiter(rest)
        return None

    def _is_answer(self, line: bytes) -> bool:
        try:
            return bool(line) and parse_reply(line) == self._answer
        except MalformedReply:
            return False


def _from_delimiter(line: bytes) -> bytes:
    """Give what could be the answer to a sync, or its beginning; nothing if it cannot."""
    start = line.rfind(DELIMITER)
    return line[start:] if start >= 0 and len(line) - start <= _SYNC_REPLY_BYTES else b""


class ReplyReader:
    """Finds the reply to a request, or the replies to several that were sent at once, among the lines that come.

    Replies with other ids belong to calls that gave up, and are skipped.
    """

    def __init__(self, ids: Sequence[int], max_line_bytes: int) -> None:
        self._ids = ids
        self._lines = LineDecoder(max_line_bytes)
        self._first: Reply | None = None
        self.has_rest = False

    def feed(self, data: bytes) -> Reply | None:
        """Take in the next bytes; once the last request has its reply, give the first reply that came.

        Raises MalformedReply; the reader is of no use after that.
        """
        lines = self._lines.feed(data)
        for number, line in enumerate(lines, 1):
            reply = parse_reply(line)
            reply_id = self._unparsed(reply) if reply.id is None else reply.id
            if reply_id in self._ids:
                self._first = self._first or reply
            if reply_id == self._ids[-1]:
                self.has_rest = number < len(lines) or self._lines.has_rest
                return self._first
        return None

    def _unparsed(self, reply: Reply) -> int:
        """Take a reply without an id for the answer to the request that came first: the agent could not parse it."""
        if isinstance(reply, Failure):
            return self._ids[0]
        raise MalformedReply("a success without an id")
