"""Networks of the host, and what follows from a network and a MAC address alone."""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from vmherd.model.errors import FieldViolation
from vmherd.model.names import check_name

INTERFACE_NAME_MAX_LENGTH = 15
"""`IFNAMSIZ` of Linux is 16, with a NUL."""

PREFIX_MIN_BITS = 16
PREFIX_MAX_BITS = 29
"""From 65,533 machines to 5 beside the host."""

UNIQUE_LOCAL = IPv6Network("fd00::/8")
"""RFC 4193, the half that everybody may choose from."""

SPECIAL = tuple(map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")))
"""Of this host, of a link, of groups, of nobody: RFC 6890."""

USER_NETWORK = "user"
NO_NETWORK = "none"
RESERVED_NAMES = frozenset({USER_NETWORK, NO_NETWORK})

# What the kernel takes and neither nft nor a shell reads as anything else.
_INTERFACE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Network:
    """A network of the host: one with a subnet is made by the helper, one without is an existing bridge."""

    name: str
    bridge: str
    subnet: IPv4Network | None = None
    ipv6_subnet: IPv6Network | None = None
    isolated: bool = False
    host_access: bool = False

    @property
    def subnets(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Those that the helper gives addresses of; the host's is the first of each."""
        return tuple(filter(None, (self.subnet, self.ipv6_subnet)))

    @property
    def gateway(self) -> IPv4Address | None:
        """The host's IPv4 address: the first of the subnet."""
        return self.subnet[1] if self.subnet else None

    @property
    def ipv6_gateway(self) -> IPv6Address | None:
        """The host's IPv6 address: the first of the subnet."""
        return self.ipv6_subnet[1] if self.ipv6_subnet else None

    def ipv6_of(self, mac: str) -> IPv6Address | None:
        """The IPv6 address of an interface, None where the network has no IPv6."""
        return eui64(self.ipv6_subnet, mac) if self.ipv6_subnet else None

    def free_address(self, taken: Container[str]) -> IPv4Address | None:
        """The lowest address for a machine that nobody has; None where there is none left, or no subnet."""
        hosts = itertools.islice(self.subnet.hosts(), 1, None) if self.subnet else ()
        return next((address for address in hosts if str(address) not in taken), None)


def eui64(subnet: IPv6Network, mac: str) -> IPv6Address:
    """The address that an interface gives itself in a subnet of 64 bits: RFC 4291, appendix A."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return subnet[int.from_bytes(identifier, "big")]


def tap_name(uid: str, index: int) -> str:
    """The name of a machine's TAP device: 40 bits from the instance's uid, 13 characters at most."""
    return f"vm{hashlib.sha256(uid.encode()).hexdigest()[:10]}{index:x}"


def check_interface_name(name: str, field: str) -> Iterator[FieldViolation]:
    """A network interface's name is one that the kernel takes and that has no meaning to any tool."""
    if not _INTERFACE_NAME.fullmatch(name) or len(name) > INTERFACE_NAME_MAX_LENGTH:
        yield FieldViolation(
            field,
            f"must have at most {INTERFACE_NAME_MAX_LENGTH} letters, digits, '-', '_' and '.', "
            f"the first a letter, is {name!r}",
        )


def check_ipv4_address(address: str, field: str) -> Iterator[FieldViolation]:
    """An IPv4 address in its usual spelling."""
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        yield FieldViolation(field, f"must be an IPv4 address, is {address!r}")


def check_network(network: Network, field: str) -> Iterator[FieldViolation]:
    """Everything that is wrong with a network's values."""
    yield from check_name(network.name, f"{field}.name")
    if network.name in RESERVED_NAMES:
        yield FieldViolation(f"{field}.name", f"{network.name!r} has a meaning of its own; choose another name")
    yield from check_interface_name(network.bridge, f"{field}.bridge")
    if network.subnet and not PREFIX_MIN_BITS <= network.subnet.prefixlen <= PREFIX_MAX_BITS:
        yield FieldViolation(
            f"{field}.subnet", f"must have from {PREFIX_MIN_BITS} to {PREFIX_MAX_BITS} bits, is {network.subnet}"
        )
    if network.subnet and any(network.subnet.overlaps(special) for special in SPECIAL):
        yield FieldViolation(f"{field}.subnet", f"{network.subnet} has a meaning of its own; take one of 10.0.0.0/8")
    if network.ipv6_subnet and (network.ipv6_subnet.prefixlen != 64 or not network.ipv6_subnet.subnet_of(UNIQUE_LOCAL)):
        yield FieldViolation(
            f"{field}.ipv6_subnet", f"must have 64 bits within {UNIQUE_LOCAL}, is {network.ipv6_subnet}"
        )
    if not network.subnet:
        for name in ("ipv6_subnet", "isolated", "host_access"):
            if getattr(network, name):
                yield FieldViolation(f"{field}.{name}", "needs a subnet: without one the bridge is somebody else's")
