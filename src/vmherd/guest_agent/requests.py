"""What clients send to an agent, as an agent reads it: bytes to requests, without any I/O.

A client sends a stream of JSON values. They need no line ends between them, several may come at once, one may come in
pieces. What is no request is answered with an error, and reading goes on behind it. A byte 0xFF, which no JSON text
contains, is answered with an error too and voids what stands before it. Beyond JSON, the agent takes texts between
apostrophes.

The errors are the agent's own but for the wording of some. A request that is out of bounds ends the stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vmherd.guest_agent.wire import finite

MAX_REQUEST_BYTES = 32 << 20
MAX_TOKENS = 1 << 18  # "[],[],[],…" takes 20 times its size in memory
MAX_DEPTH = 64  # real requests have less than 10
_MAX_WORD_BYTES = 1024
_MAX_SHOWN = 100

_SPACE = re.compile(rb"[ \t\r\n]*+")
_TOKEN = re.compile(rb"(?P<mark>[{}\[\]:,])|(?P<quote>[\"'])|(?P<word>[-+.0-9A-Za-z]++)|(?P<stray>.)", re.DOTALL)
_NUMBER_OR_NAME = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|[a-z]+")
_REST_OF_TEXT = {
    quote: re.compile(rb"(?:[^%b\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+" % quote) for quote in (b'"', b"'")
}
_AFTER_STRAY = re.compile(rb"[^\x00-\x1f\xfe\xff{}\[\]:,]*+")  # the agent passes over what may belong to it

_NESTING = {b"{": (1, 0), b"}": (-1, 0), b"[": (0, 1), b"]": (0, -1)}
"""How a token changes the number of open braces and of open brackets."""

_TO_RESPELL = re.compile(rb"\\.|\"")
_SPELLINGS = {b'"': rb"\"", rb"\'": b"'"}
"""What the agent takes in a text, and what JSON has for it."""

_MEMBERS: dict[str, tuple[type, str]] = {
    "execute": (str, "a string"),
    "arguments": (dict, "an object"),
    "id": (object, "anything"),
}


class RequestOutOfBounds(Exception):
    """A request is too large or nested too deeply; where the next one begins cannot be told."""


@dataclass(frozen=True, slots=True)
class Request:
    """A command to carry out. Its reply has to repeat `echo`: the request's `id`, whatever JSON that is."""

    command: str
    arguments: Mapping[str, object]
    echo: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that is no request, and what the agent says to it."""

    desc: str
    echo: Mapping[str, object] = field(default_factory=dict)


class RequestDecoder:
    """Cuts a stream of bytes into requests, whatever pieces it comes in."""

    def __init__(self, *, max_request_bytes: int = MAX_REQUEST_BYTES) -> None:
        self._max_request_bytes = max_request_bytes
        self._lexer = _Lexer(max_request_bytes)
        self._begin()

    def feed(self, data: bytes) -> Iterator[Request | Refusal]:
        """Take in the next bytes and give what they complete, in order; the caller takes all of it.

        Raises RequestOutOfBounds; the decoder is of no use after that.
        """
        for token in self._lexer.feed(data):
            if isinstance(token, Refusal):
                self._begin()
                yield token
            elif self._ends_with(token):
                text = b" ".join(self._tokens)
                self._begin()
                yield _parse(text)

    def _begin(self) -> None:
        self._tokens: list[bytes] = []
        self._size_bytes = 0
        self._braces = 0
        self._brackets = 0

    def _ends_with(self, token: bytes) -> bool:
        """Take in one token, and tell whether a value ends with it; one that is out of balance does."""
        self._tokens.append(token)
        self._size_bytes += len(token)
        braces, brackets = _NESTING.get(token, (0, 0))
        self._braces += braces
        self._brackets += brackets
        _check("token size", self._size_bytes, self._max_request_bytes)
        _check("token count", len(self._tokens), MAX_TOKENS)
        _check("nesting depth", self._braces + self._brackets, MAX_DEPTH)
        return self._braces < 0 or self._brackets < 0 or self._braces == self._brackets == 0


class _Lexer:
    """Cuts a stream of bytes into JSON's tokens."""

    def __init__(self, max_text_bytes: int) -> None:
        self._max_text_bytes = max_text_bytes
        self._rest = b""  # the start of a word or of an escape sequence
        self._quote = b""  # what ends the text that we are in
        self._text = bytearray()
        self._after_stray = False

    def feed(self, data: bytes) -> Iterator[bytes | Refusal]:
        """Give the tokens that the next bytes complete; a Refusal voids those before it."""
        data, self._rest = self._rest + data, b""
        at = 0
        while at < len(data):
            if self._after_stray:
                at = _end(_AFTER_STRAY, data, at)
                self._after_stray = at == len(data)
            elif self._quote:
                start, at = at, _end(_REST_OF_TEXT[self._quote], data, at)
                self._text += data[start:at]
                _check("token size", len(self._text), self._max_text_bytes)
                stop = data[at : at + 2]
                if stop in (b"", b"\\"):
                    self._rest = stop
                    return
                stop = stop if stop.startswith(b"\\") else stop[:1]
                at += len(stop)
                yield self._whole_text() if stop == self._quote else self._stray(stop)
            elif token := _TOKEN.match(data, _end(_SPACE, data, at)):
                at = token.end()
                match token.lastgroup:
                    case "mark":
                        yield token[0]
                    case "quote":
                        self._quote = token[0]
                    case "word" if at == len(data) and len(token[0]) <= _MAX_WORD_BYTES:
                        self._rest = token[0]
                    case "word" if _NUMBER_OR_NAME.fullmatch(token[0]):
                        yield token[0]
                    case _:
                        yield self._stray(token[0])
            else:
                return

    def _whole_text(self) -> bytes:
        text = bytes(self._text)
        if self._quote == b"'" or rb"\'" in text:
            text = _TO_RESPELL.sub(lambda found: _SPELLINGS.get(found[0], found[0]), text)
        self._leave_text()
        return b'"%b"' % text

    def _stray(self, data: bytes) -> Refusal:
        self._leave_text()
        self._after_stray = True
        return Refusal(f"JSON parse error, stray '{data[:_MAX_SHOWN].decode(errors='replace')}'")

    def _leave_text(self) -> None:
        self._quote = b""
        self._text.clear()


def _end(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    """Give the end of what the pattern takes at this place."""
    found = pattern.match(data, at)
    return found.end() if found else at


def _check(what: str, reached: int, limit: int) -> None:
    if reached > limit:
        raise RequestOutOfBounds(f"JSON {what} limit exceeded")


def _parse(text: bytes) -> Request | Refusal:
    try:
        message = _DECODER.decode(text.decode())
    except ValueError as error:
        return Refusal(f"JSON parse error, {error}")
    if not isinstance(message, dict):
        return Refusal("QMP input must be a JSON object")
    echo = {"id": message["id"]} if "id" in message else {}
    for name, value in message.items():
        if name not in _MEMBERS:
            return Refusal(f"QMP input member '{name[:_MAX_SHOWN]}' is unexpected", echo)
        kind, called = _MEMBERS[name]
        if not isinstance(value, kind):
            return Refusal(f"QMP input member '{name}' must be {called}", echo)
    if "execute" not in message:
        return Refusal("QMP input lacks member 'execute'", echo)
    return Request(message["execute"], message.get("arguments", {}), echo)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("duplicate key")
    return members


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=finite)
