"""Where a guest agent is reached: a unix socket, or a TCP port that QEMU listens on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_MAX_PORT = 65535

_TCP = re.compile(r"(?:\[(?P<bracketed>[^][]*)\]|(?P<plain>[^][:]*)):(?P<port>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket. Raises ValueError for a path that no file can have."""

    path: str

    def __post_init__(self) -> None:
        if not self.path or "\0" in self.path:
            raise ValueError(f"{self.path!r} is no path of a socket")

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, by name or number, and a port of it. Raises ValueError for what cannot be one."""

    host: str
    port: int

    def __post_init__(self) -> None:
        try:
            self.host.encode("idna")
        except UnicodeError as error:
            raise ValueError(f"{self.host!r} is no name of a host: {error}") from error
        if not self.host or "\0" in self.host:
            raise ValueError(f"{self.host!r} is no name of a host")
        if not 0 < self.port <= _MAX_PORT:
            raise ValueError(f"{self.port} is no port: they are 1 to {_MAX_PORT}")

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Understand `/run/vm/agent.sock`, `unix:/run/vm/agent.sock`, `tcp:127.0.0.1:1234`, `tcp:[::1]:1234`.

    Raises ValueError, which says what is wrong with the text.
    """
    scheme, colon, rest = text.partition(":")
    match scheme:
        case "unix" if colon:
            return UnixAddress(rest)
        case "tcp" if colon:
            return _parse_tcp(text, rest)
        case _ if colon and "/" not in scheme:
            raise ValueError(f"{text!r} begins with neither unix: nor tcp:; a path with a colon needs a / before it")
    return UnixAddress(text)


def _parse_tcp(text: str, rest: str) -> TcpAddress:
    found = _TCP.fullmatch(rest)
    if found is None:
        raise ValueError(f"{text!r} is not of the form tcp:HOST:PORT, or tcp:[HOST]:PORT for a host with colons")
    return TcpAddress(found["bracketed"] or found["plain"] or "", int(found["port"]))


def address_of(where: str | os.PathLike[str] | Address) -> Address:
    """Give the address that a caller means: a text is parsed, a path is the path of a unix socket.

    Raises ValueError.
    """
    match where:
        case UnixAddress() | TcpAddress():
            return where
        case str():
            return parse_address(where)
    return UnixAddress(os.fspath(where))
