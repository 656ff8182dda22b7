"""Notices when somebody else takes away what the helper made: firewall tables, bridges, their addresses.

The kernel tells of every change on netlink multicast groups: netlink(7), rtnetlink(7), linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Self

NETLINK_NETFILTER = 12
NFNLGRP_NFTABLES = 7
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_NEWGEN = 15
"""Ends what one transaction did."""
FIRST_ATTRIBUTE = 1
"""In every message about a part of a table the table's name is the first kind of attribute."""

RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100
RTM_NEWLINK, RTM_DELLINK, RTM_DELADDR = 16, 17, 21
IFF_UP = 1

MESSAGE_HEADER = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port"""
INDEX_AND_FLAGS = struct.Struct("=4xiI")
"""Of ifinfomsg, after family and type. ifaddrmsg has its index in the same place, and no flags."""
ATTRIBUTE_HEADER = struct.Struct("=HH")
NFGENMSG_BYTES = 4
BUFFER_BYTES = 1 << 16


class Watch:
    """Calls `on_harm` in the event loop after a change by somebody else to the tables or the bridges."""

    def __init__(self, tables: set[str], on_harm: Callable[[], None]) -> None:
        self._tables = tables
        self._on_harm = on_harm
        self._touched = False
        """The transaction that is being told of has touched a table."""
        self.bridges: set[int] = set()
        """The indexes of the bridges."""
        self._firewall = _subscribe(NETLINK_NETFILTER, 1 << (NFNLGRP_NFTABLES - 1))
        self._links = _subscribe(socket.NETLINK_ROUTE, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._firewall, self._on_firewall)
        loop.add_reader(self._links, self._on_links)
        return self

    def __exit__(self, *_: object) -> None:
        for source in (self._firewall, self._links):
            asyncio.get_running_loop().remove_reader(source)
            source.close()

    @contextlib.contextmanager
    def own_change(self) -> Iterator[None]:
        """Encloses one transaction of the helper's own. The kernel tells of it before it is over."""
        self._on_firewall()
        asyncio.get_running_loop().remove_reader(self._firewall)
        own = 0
        try:
            yield
            own = 1
        finally:
            if self._transactions() > own:
                self._on_harm()
            asyncio.get_running_loop().add_reader(self._firewall, self._on_firewall)

    def _on_firewall(self) -> None:
        if self._transactions():
            self._on_harm()

    def _on_links(self) -> None:
        if any(self._harms(kind, body) for kind, body in _messages(self._links)):
            self._on_harm()

    def _transactions(self) -> int:
        """How many transactions that the kernel told of since the last time have touched a table."""
        count = 0
        for kind, body in _messages(self._firewall):
            if kind is None:
                count += 2  # what was lost may have been anybody's
            elif kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN:
                count += self._touched
                self._touched = False
            elif _table(body) in self._tables:
                self._touched = True
        return count

    def _harms(self, kind: int | None, body: bytes) -> bool:
        if kind not in (RTM_NEWLINK, RTM_DELLINK, RTM_DELADDR):
            return kind is None
        index, flags = INDEX_AND_FLAGS.unpack_from(body)
        return index in self.bridges and (kind != RTM_NEWLINK or not flags & IFF_UP)


def _subscribe(protocol: int, groups: int) -> socket.socket:
    source = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    source.bind((0, groups))
    return source


def _messages(source: socket.socket) -> Iterator[tuple[int | None, bytes]]:
    """The type and the body of each message that waits; None as the type where the kernel had to drop some."""
    while True:
        try:
            data = source.recv(BUFFER_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None, b""
            continue
        at = 0
        while at + MESSAGE_HEADER.size <= len(data):
            length, kind, *_ = MESSAGE_HEADER.unpack_from(data, at)
            yield kind, data[at + MESSAGE_HEADER.size : at + length]
            at += max(MESSAGE_HEADER.size, length + 3 & ~3)


def _table(body: bytes) -> str:
    """The name of the table that a message of nftables is about."""
    at = NFGENMSG_BYTES
    while at + ATTRIBUTE_HEADER.size <= len(body):
        length, kind = ATTRIBUTE_HEADER.unpack_from(body, at)
        if kind == FIRST_ATTRIBUTE:
            return body[at + ATTRIBUTE_HEADER.size : at + length].rstrip(b"\0").decode(errors="replace")
        at += max(ATTRIBUTE_HEADER.size, length + 3 & ~3)
    return ""
