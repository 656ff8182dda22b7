"""The guest agent's wire format: bytes to replies and back, without any I/O.

Requests and replies are JSON objects, a reply is one line. `guest-sync-delimited` puts both sides in step: the request
starts with a byte 0xFF, which no JSON text contains, so the agent drops what an earlier client left half-sent; its
reply starts with 0xFF, so we drop what an earlier client left unread.
See https://www.qemu.org/docs/master/interop/qemu-ga-ref.html#command-QGA-qapi-schema.guest-sync-delimited

Whatever comes from the guest is hostile until checked: a line is bounded in bytes, in values and in depth.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NoReturn, TypeVar

T = TypeVar("T")

DELIMITER = b"\xff"

MAX_REQUEST_BYTES = 64 << 20  # the agent refuses a request with more JSON than this
MAX_LINE_BYTES = 65 << 20  # guest-file-read gives at most 48 MiB, which are 64 MiB in base64
MAX_VALUES = 1 << 18  # a line of "[],[],[],…" takes 20 times its size in memory
MAX_DEPTH = 64  # real replies have less than 10
MAX_ERROR_CHARS = 4096  # an error's text ends up in logs and in other errors

_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class MalformedReply(Exception):
    """A line, or a value in it, is not what a guest agent sends."""


@dataclass(frozen=True, slots=True)
class Success:
    """The agent carried out the request with this id."""

    id: int | None
    value: object


@dataclass(frozen=True, slots=True)
class Failure:
    """The agent refused the request with this id; without an id it could not even parse it."""

    id: int | None
    error_class: str
    desc: str


Reply = Success | Failure


def encode_request(command: str, arguments: Mapping[str, object] | None, request_id: int) -> bytes:
    """Give the line that asks for `command`.

    Raises TypeError or ValueError for arguments that JSON cannot carry or that are too large for the agent.
    """
    message: dict[str, object] = {"execute": command, "id": request_id}
    if arguments:
        message["arguments"] = dict(arguments)
    line = json.dumps(message, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    if len(line) > MAX_REQUEST_BYTES:
        raise ValueError(f"{command}: {len(line)} bytes are more than the agent takes ({MAX_REQUEST_BYTES})")
    return line


def encode_sync(token: int) -> bytes:
    """Give the line that asks the agent to forget what came before and to answer with `token`.

    The token is a signed 64-bit integer.
    """
    return DELIMITER + encode_request("guest-sync-delimited", {"id": token}, token)


def is_sync_reply(line: bytes, token: int) -> bool:
    """Tell whether `line` is the answer to `encode_sync(token)`: what comes after it belongs to us."""
    if not line.startswith(DELIMITER):
        return False
    try:
        return parse_reply(line) == Success(token, token)
    except MalformedReply:
        # Until we are in step anything may come, for example the tail of another client's reply.
        return False


class LineDecoder:
    """Cuts a stream of bytes into lines, whatever pieces it comes in.

    A delimiter byte voids what stands before it in its line, so it can only be the first byte of a line given.
    """

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_line_bytes = max_line_bytes
        self._line = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take in the next bytes and give the lines that they complete, without line ends and empty lines.

        Raises MalformedReply if a line is too long; the decoder is of no use after that.
        """
        lines = []
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._extend(end)
            if self._line:
                lines.append(bytes(self._line))
                self._line.clear()
        self._extend(rest)
        return lines

    def _extend(self, piece: bytes) -> None:
        start = piece.rfind(DELIMITER)
        if start >= 0:
            self._line.clear()
            piece = piece[start:]
        self._line += piece
        if len(self._line) > self._max_line_bytes:
            raise MalformedReply(f"a line of more than {self._max_line_bytes} bytes")


def parse_reply(line: bytes) -> Reply:
    """Give the reply that `line` holds, with or without a delimiter before it.

    Raises MalformedReply.
    """
    message = _parse_json(line.removeprefix(DELIMITER))
    reply_id = optional(message, "id", int)
    match message:
        case {"return": value, **others} if "error" not in others:
            return Success(reply_id, value)
        case {"error": {"class": str(error_class), "desc": str(desc)}, **others} if "return" not in others:
            return Failure(reply_id, error_class[:MAX_ERROR_CHARS], desc[:MAX_ERROR_CHARS])
    raise MalformedReply("a reply has either 'return' or an 'error' with 'class' and 'desc'")


def member(value: object, name: str, kind: type[T]) -> T:
    """Give the member `name` of a JSON object, which must be there and of exactly this kind.

    Raises MalformedReply.
    """
    found = optional(value, name, kind)
    if found is None:
        raise MalformedReply(f"'{name}' is missing")
    return found


def optional(value: object, name: str, kind: type[T]) -> T | None:
    """Give the member `name` of a JSON object, or None where it is absent or null.

    Raises MalformedReply if it is of another kind; true is no number and 1.0 no integer.
    """
    if not isinstance(value, dict):
        raise MalformedReply(f"{_kind(value)} where an object belongs")
    found = value.get(name)
    if found is None:
        return None
    if type(found) is not kind:
        raise MalformedReply(f"'{name}' is {_kind(found)}, not {_KINDS[kind]}")
    return found


_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def _kind(value: object) -> str:
    return _KINDS[type(value)]


def _parse_json(text: bytes) -> object:
    if sum(map(text.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise MalformedReply(f"more than {MAX_VALUES} values in one reply")
    try:
        value: object = _DECODER.decode(text.decode())
        _check_depth(value)
        if _HALF_CHARACTER.search(text):
            # JSON can spell half of a character, which no text that leaves this process could hold.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise MalformedReply("nested too deeply") from error
    except ValueError as error:
        raise MalformedReply(f"not JSON: {error}") from error
    return value


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = list(chain.from_iterable(map(_children, level)))
        if not level:
            return
    raise MalformedReply(f"nested deeper than {MAX_DEPTH} levels")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _integer(digits: str) -> int:
    # QEMU's integers are 64 bits, signed or not. The length comes first: int() of many digits takes long.
    if len(digits) > 20 or not -(1 << 63) <= (number := int(digits)) < 1 << 64:
        raise ValueError(f"an integer of more than 64 bits: {digits[:24]}")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"a number out of range: {digits[:24]}")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_finite, parse_constant=_no_constant)
