"""Frames and packets that guests send, made by hand, and what comes of them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from tests.framework.netns import Namespace

TIMEOUT_S = 20.0
REFUSAL_S = 1.0
"""How long a test waits for what must not come."""

BROADCAST = "ff:ff:ff:ff:ff:ff"
ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def frame(source: str, kind: int, body: bytes, destination: str = BROADCAST) -> bytes:
    return mac_bytes(destination) + mac_bytes(source) + struct.pack("!H", kind) + body


def arp(mac: str, address: str, target: str, *, operation: int = 1) -> bytes:
    addresses = mac_bytes(mac) + IPv4Address(address).packed + bytes(6) + IPv4Address(target).packed
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + addresses


def checksum(data: bytes) -> int:
    """The checksum of the internet protocols: RFC 1071."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp4(source: str, target: str, source_port: int, target_port: int, payload: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram, whose checksum is left out."""
    datagram = struct.pack("!HHHH", source_port, target_port, 8 + len(payload), 0) + payload
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0) + addresses
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + datagram


def icmp6(source: str, target: str, kind: int, body: bytes) -> bytes:
    """An IPv6 packet with an ICMPv6 message."""
    addresses = IPv6Address(source).packed + IPv6Address(target).packed
    message = struct.pack("!BBH", kind, 0, 0) + body
    total = checksum(addresses + struct.pack("!II", len(message), 58) + message)
    message = message[:2] + struct.pack("!H", total) + message[4:]
    return struct.pack("!IHBB", 6 << 28, len(message), 58, 255) + addresses + message


def raw_socket(namespace: Namespace, interface: str = "eth0") -> socket.socket:
    """A socket for all frames of an interface."""

    def opened() -> socket.socket:
        it = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        it.bind((interface, 0))
        it.settimeout(TIMEOUT_S)
        return it

    return namespace.call(opened)


def arrived(sender: socket.socket, receiver: socket.socket, frames: list[bytes], marker: bytes) -> list[bytes]:
    """Which of these frames come through, sent before a marker that does: a bridge keeps the order."""
    for data in (*frames, marker):
        sender.send(data)
    seen = []
    while (data := receiver.recv(65535)) != marker:
        seen.append(data)
    return [data for data in frames if data in seen]


def reaches(namespace: Namespace, address: str, port: int, *, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether a TCP connection from a namespace gets through."""

    def connect() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((address, port), timeout_s).close()
            return True
        return False

    return namespace.call(connect)


def listening(namespace: Namespace, address: str, port: int = 7) -> socket.socket:
    """A TCP server whose connections the kernel accepts."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return namespace.call(lambda: socket.create_server((address, port), family=family))


def dhcp_message(mac: str, kind: int, options: bytes = b"", identity: bytes = b"same") -> bytes:
    """A packet to all DHCP servers from somebody without an address: RFC 2131."""
    fixed = (
        struct.pack("!BBBB4sHH", 1, 1, 6, 0, identity, 0, 0x8000) + bytes(16) + mac_bytes(mac) + bytes(10 + 64 + 128)
    )
    options = b"\x63\x82\x53\x63" + bytes([53, 1, kind]) + options + bytes([55, 4, 1, 3, 6, 15, 255])
    return udp4("0.0.0.0", "255.255.255.255", 68, 67, fixed + options)


def dhcp(namespace: Namespace, mac: str, *, timeout_s: float = TIMEOUT_S) -> dict[int, bytes]:
    """The options that a DHCP server offers, and under 0 the address: RFC 2131."""
    identity = os.urandom(4)
    with raw_socket(namespace) as link:
        link.settimeout(timeout_s)
        chosen: dict[int, bytes] = {}
        for kind, expected in ((1, 2), (3, 5)):
            options = b"\x32\x04" + chosen[0] + b"\x36\x04" + chosen[54] if chosen else b""
            link.send(frame(mac, IPV4, dhcp_message(mac, kind, options, identity)))
            while True:
                data = link.recv(65535)
                body = data[42:]
                if data[12:14] == b"\x08\x00" and data[23] == 17 and data[34:36] == b"\0C" and body[4:8] == identity:
                    break
            chosen = _options(body[240:]) | {0: body[16:20]}
            assert chosen[53] == bytes([expected]), chosen
        return chosen


def _options(data: bytes) -> dict[int, bytes]:
    options = {}
    at = 0
    while data[at] != 255:
        if data[at]:
            options[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
            at += 1 + data[at + 1]
        at += 1
    return options


def lookup(namespace: Namespace, server: str, name: str, kind: int = 1) -> list[str]:
    """The addresses that a DNS server gives for a name: kind 1 for IPv4, 28 for IPv6."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = struct.pack("!6H", 1, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with namespace.call(lambda: socket.socket(family, socket.SOCK_DGRAM)) as link:
        link.settimeout(TIMEOUT_S)
        link.connect((server, 53))
        link.send(question)
        reply = link.recv(4096)
    at, addresses = len(question), []
    for _ in range(struct.unpack_from("!H", reply, 6)[0]):
        size = struct.unpack_from("!H", reply, at + 10)[0]  # the name is a pointer of 2 bytes
        data = reply[at + 12 : at + 12 + size]
        addresses.append(str(IPv4Address(data) if size == 4 else IPv6Address(data)))
        at += 12 + size
    return addresses
