"""The guest agent's wire format: bytes to replies and back, without any I/O.

Requests and replies are JSON objects, a reply is one line. `guest-sync-delimited` puts both sides in step: the request
starts with a byte 0xFF, which no JSON text contains, so the agent drops what an earlier client left half-sent; its
reply starts with 0xFF, so we drop what an earlier client left unread.
See https://www.qemu.org/docs/master/interop/qemu-ga-ref.html#command-QGA-qapi-schema.guest-sync-delimited

Whatever comes from the guest is hostile until checked: a line is bounded in bytes, in values and in depth. The bounds
keep what one reply takes in memory, parsed and unparsed together, below 100 MiB.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from mmap import mmap
from typing import NoReturn, TypeVar

T = TypeVar("T")

DELIMITER = b"\xff"

MAX_REQUEST_BYTES = 64 << 20  # the agent refuses a request with more JSON than this
MAX_FILE_READ_BYTES = 32 << 20  # what one guest-file-read may ask for; the agent would give 48 MiB
MAX_CAPTURED_BYTES = 16 << 20  # what the agent keeps of each of a program's two streams
MAX_PLAIN_BYTES = 4 << 20  # a reply, or what it has besides long texts; one emoji makes it four times as large
MAX_BESIDE_TEXTS_BYTES = 256 << 10
MAX_VALUES = 1 << 18  # a line of "[],[],[],…" takes 20 times its size in memory
MAX_DEPTH = 64  # real replies have less than 10
MAX_ERROR_CHARS = 4096  # an error's text ends up in logs and in other errors

_LONG_TEXT_BYTES = 64 << 10
_WHITESPACE = " \t\r\n"
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def _base64_bytes(size_bytes: int) -> int:
    return (size_bytes + 2) // 3 * 4


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

Line = bytes | bytearray | mmap


def encode_request(command: str, arguments: Mapping[str, object] | None, request_id: int) -> bytes:
    """Give the line that asks for `command`.

    Raises TypeError or ValueError for arguments that JSON cannot carry or that are too large for the agent.
    """
    more = f', "arguments": {_ENCODER.encode(dict(arguments))}' if arguments else ""
    line = f'{{"execute": {_ENCODER.encode(command)}, "id": {request_id}{more}}}\n'.encode()
    if len(line) > MAX_REQUEST_BYTES:
        raise ValueError(f"{command}: {len(line)} bytes are more than the agent takes ({MAX_REQUEST_BYTES})")
    return line


def encode_sync(token: int) -> bytes:
    """Give the line that asks the agent to forget what came before and to answer with `token`.

    The token is a signed 64-bit integer.
    """
    return DELIMITER + encode_request("guest-sync-delimited", {"id": token}, token)


def max_reply_bytes(command: str, arguments: Mapping[str, object] | None) -> int:
    """Give the bytes that the reply to a command may have.

    Raises ValueError if it asks for more of a file than one reply may hold.
    """
    if command == "guest-exec-status":
        return MAX_PLAIN_BYTES + 2 * _base64_bytes(MAX_CAPTURED_BYTES)
    count = arguments.get("count") if arguments and command == "guest-file-read" else None
    if not isinstance(count, int):
        return MAX_PLAIN_BYTES
    if count > MAX_FILE_READ_BYTES:
        raise ValueError(f"{command}: 'count' is {count}, and one reply holds at most {MAX_FILE_READ_BYTES} bytes")
    return MAX_PLAIN_BYTES + _base64_bytes(max(count, 0))


def parse_reply(line: Line) -> Reply:
    """Give the reply that `line` holds, which is one to `encode_sync` if it begins with a delimiter.

    Raises MalformedReply.
    """
    message = parse_json(line[1:] if line[:1] == DELIMITER and len(line) <= MAX_PLAIN_BYTES else line)
    reply_id = optional(message, "id", int)
    match message:
        case {"return": _, "error": _}:
            pass
        case {"return": value}:
            return Success(reply_id, value)
        case {"error": {"class": str(error_class), "desc": str(desc)}}:
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


def parse_json(text: Line) -> object:
    """Give the value of a JSON text, with exact integers and within the bounds that hold for a reply.

    Raises MalformedReply.
    """
    long_texts: dict[str, str] = {}
    if len(text) > _LONG_TEXT_BYTES or isinstance(text, mmap):
        text, long_texts = _without_long_texts(text)
    openings = text.count(b"[") + text.count(b"{")
    if openings + text.count(b",") > MAX_VALUES:
        raise MalformedReply(f"more than {MAX_VALUES} values")
    try:
        characters = text.decode().strip(_WHITESPACE)
        value, end = (_decoder(long_texts) if long_texts else _DECODER).raw_decode(characters)
        if end < len(characters):
            raise MalformedReply(f"not JSON: more after its end at character {end}")
        if openings >= MAX_DEPTH:
            _check_depth(value)
        if "\\" in characters and _HALF_CHARACTER.search(characters):
            # JSON can spell half of a character, which no text that leaves this process could hold.
            _ENCODER.encode(value).encode()
    except RecursionError as error:
        raise MalformedReply("nested too deeply") from error
    except ValueError as error:
        raise MalformedReply(f"not JSON: {error}") from error
    return value


def _without_long_texts(text: Line) -> tuple[bytes, dict[str, str]]:
    """Take long texts out of a JSON text: what a file or a program has in base64, copied once and never scanned.

    Gives the JSON text with a number in place of each, such as no agent writes, and the long texts by these numbers.
    Raises MalformedReply if what stays is too long.
    """
    found = _long_texts(text)
    max_bytes = MAX_BESIDE_TEXTS_BYTES if found else MAX_PLAIN_BYTES
    if len(text) - sum(map(len, found.values())) > max_bytes:
        raise MalformedReply(f"more than {max_bytes} bytes besides long texts without escapes")
    numbered = {f"0e{number}": long_text for number, long_text in enumerate(found.values())}
    ends = [0, *(start + len(long_text) + 2 for start, long_text in found.items())]
    pieces = [bytes(text[end:start]) for end, start in zip(ends, [*found, len(text)], strict=True)]
    rest = bytearray(pieces[0])
    for number, piece in zip(numbered, pieces[1:], strict=True):
        rest += number.encode() + piece
    return bytes(rest), numbered


def _long_texts(text: Line) -> dict[int, str]:
    """Give the long texts of a JSON text by the place of their first quote; they are ASCII without escapes."""
    if text.find(b"\\", 0) >= 0:
        return {}
    found = {}
    ended = 0  # all texts that began before have ended before
    place = _LONG_TEXT_BYTES  # a text of this length lies across a multiple of it
    with memoryview(text) as view:
        while place < len(text) and (end := text.find(b'"', place)) >= 0:
            start = text.rfind(b'"', ended, place)
            if start >= 0 and end - start > _LONG_TEXT_BYTES:
                if start - ended > MAX_PLAIN_BYTES:
                    break  # it is refused anyway
                if text[ended:start].count(b'"') % 2:
                    ended = start + 1
                else:
                    with contextlib.suppress(UnicodeDecodeError):
                        found[start] = str(view[start + 1 : end], "ascii")
                    ended = end + 1
            place = (end // _LONG_TEXT_BYTES + 1) * _LONG_TEXT_BYTES
    return found


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


def finite(digits: str) -> float:
    """Give a number of JSON; raises ValueError for one that a float has no room for."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"a number out of range: {digits[:24]}")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _decoder(long_texts: Mapping[str, str]) -> json.JSONDecoder:
    def number(digits: str) -> object:
        return long_texts[digits] if digits in long_texts else finite(digits)

    return json.JSONDecoder(parse_int=_integer, parse_float=number, parse_constant=_no_constant)


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=finite, parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
