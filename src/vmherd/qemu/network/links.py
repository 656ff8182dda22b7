"""Bridges, TAP devices and what the kernel knows of them, over rtnetlink."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_interface, ip_network
from pathlib import Path
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmherd.model.errors import FailedPrecondition
from vmherd.model.network import Network
from vmherd.qemu.network.rules import HOST_LINK_LOCAL

# linux/if_tun.h
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

# linux/if_addr.h: the address is there at once, although a bridge without ports has nobody to ask whether it is taken.
IFA_F_NODAD = 0x02
# linux/neighbour.h: REACHABLE, STALE, DELAY, PROBE, PERMANENT
NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x80

RTPROT_RA = 9  # linux/rtnetlink.h
IPV4_SETTINGS, IPV6_SETTINGS = Path("/proc/sys/net/ipv4/conf"), Path("/proc/sys/net/ipv6/conf")

_TAP_NAME = re.compile(r"vm[0-9a-f]{11}")
"""What `tap_name` makes."""


@dataclass(frozen=True)
class Link:
    """A network interface."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    master: int | None
    """Index of the bridge whose port it is."""


def bridge_mac(directory: Path, bridge: str) -> str:
    """The MAC address that a bridge is made with: by it a helper knows its own, which no later step could show as
    safely, and guests keep the host's address in mind whatever ports come and go.
    """
    digest = hashlib.sha256(f"{directory}/{bridge}".encode()).digest()
    return ":".join(["52", *(f"{byte:02x}" for byte in digest[:5])])


async def find_link(ipr: AsyncIPRoute, name: str) -> Link | None:
    """The network interface of this name."""
    try:
        [message] = await ipr.link("get", ifname=name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    return _link(message)


async def ports_of(ipr: AsyncIPRoute, bridge: Link) -> list[Link]:
    """The ports of a bridge."""
    return [_link(message) async for message in await ipr.get_links(master=bridge.index)]


async def make_bridge(ipr: AsyncIPRoute, name: str, mac: str) -> Link:
    """Makes a bridge."""
    # It floods multicasts, so that no guest can take them over by asking as a router does.
    await ipr.link("add", ifname=name, kind="bridge", address=mac, br_mcast_snooping=0)
    link = await find_link(ipr, name)
    if link is None:
        raise FailedPrecondition(f"{name} went as soon as it was made", reason="NETWORK_NOT_USABLE")
    return link


async def set_up_bridge(ipr: AsyncIPRoute, bridge: Link, network: Network) -> None:
    """Gives a bridge the host's addresses on its network and no others, and takes it up."""
    wanted = {ip_interface(f"{subnet[1]}/{subnet.prefixlen}") for subnet in network.subnets}
    if network.ipv6_subnet:
        wanted.add(IPv6Interface(f"{HOST_LINK_LOCAL}/64"))
    # The host takes no address from a guest, has none but these, and has no IPv6 at all where the network has none.
    _set_ipv6(bridge, accept_ra=0, addr_gen_mode=1, disable_ipv6=int(not network.ipv6_subnet))
    await ipr.link("set", index=bridge.index, ifalias=f"vmherd: network {network.name}", state="up")
    present = await addresses(ipr, bridge)
    for command, some in (("del", present - wanted), ("add", wanted - present)):
        for address in some:
            flags = {"flags": IFA_F_NODAD} if address.version == 6 else {}
            await ipr.addr(
                command, index=bridge.index, address=str(address.ip), prefixlen=address.network.prefixlen, **flags
            )


async def addresses(ipr: AsyncIPRoute, bridge: Link) -> set[IPv4Interface | IPv6Interface]:
    """The host's addresses on a bridge."""
    return {
        ip_interface(f"{message.get('address')}/{message['prefixlen']}")
        async for message in await ipr.get_addr(index=bridge.index)
    }


async def plug_in(ipr: AsyncIPRoute, tap: Link, bridge: Link, *, isolated: bool) -> None:
    """Makes a TAP device a port of a bridge. It is up only then, and the host itself never listens to a guest."""
    # There are addresses of Ethernet that a bridge leaves to the port, which must not take a guest for a router then.
    _set_ipv6(tap, disable_ipv6=1)
    (IPV4_SETTINGS / tap.name / "rp_filter").write_text("1")  # no route leads here, so that all sources are refused
    # A bridge takes the smallest MTU of its ports.
    await ipr.link("set", index=tap.index, master=bridge.index, mtu=bridge.mtu)
    await ipr.brport("set", index=tap.index, isolated=int(isolated))
    await ipr.link("set", index=tap.index, state="up")


def is_tap(link: Link) -> bool:
    """Whether this is a machine's TAP device, of whatever machine."""
    return _TAP_NAME.fullmatch(link.name) is not None


async def remove_tap(ipr: AsyncIPRoute, name: str) -> None:
    """Removes a TAP device that its QEMU has not taken along: one that its guest has taken over can make it stay."""
    if tap := await find_link(ipr, name):
        with contextlib.suppress(NetlinkError):  # it has gone by itself
            await ipr.link("del", index=tap.index)


def open_tap(name: str) -> int:
    """Makes a TAP device that is gone when its descriptor is closed, with headers that let a guest offload work.

    Raises:
        OSError: EBUSY: a process has it.
    """
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


async def routes(ipr: AsyncIPRoute) -> list[IPv4Network | IPv6Network]:
    """Where the host's routes lead, default routes apart."""
    return [
        ip_network(f"{message.get('dst')}/{message['dst_len']}")
        async for message in await ipr.get_routes()
        if message.get("dst")
    ]


async def advertised(ipr: AsyncIPRoute) -> set[str]:
    """The interfaces whose routes the kernel has from a router, and would lose once the host is a router itself."""
    routes = [message async for message in await ipr.get_routes(family=socket.AF_INET6, proto=RTPROT_RA)]
    names = {socket.if_indextoname(message.get("oif")) for message in routes}
    # 2 means: also where the host forwards. 0: somebody else than the kernel listens to routers.
    return {name for name in names if (IPV6_SETTINGS / name / "accept_ra").read_text().strip() == "1"}


async def neighbours(ipr: AsyncIPRoute, bridge: Link) -> list[tuple[str, str]]:
    """The addresses that the host has heard of on a bridge, each with its MAC address."""
    return [
        (message.get("dst"), message.get("lladdr"))
        async for message in await ipr.get_neighbours(ifindex=bridge.index)
        if message["state"] & NUD_VALID and message.get("lladdr")
    ]


async def forget_neighbour(ipr: AsyncIPRoute, bridge: Link, mac: str) -> None:
    """Lets the host forget the addresses that it has heard of with a MAC address on a bridge."""
    for address, its in await neighbours(ipr, bridge):
        if its == mac:
            with contextlib.suppress(NetlinkError):  # it is forgotten already
                await ipr.neigh("del", dst=address, ifindex=bridge.index)


def _set_ipv6(link: Link, **settings: int) -> None:
    """Changes how the host uses IPv6 on an interface; a kernel without IPv6 has nothing to change."""
    for name, value in settings.items() if IPV6_SETTINGS.exists() else ():
        (IPV6_SETTINGS / link.name / name).write_text(str(value))


def _link(message: Any) -> Link:
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=message.get(("linkinfo", "kind")) or "",
        mac=message.get("address") or "",
        mtu=message.get("mtu"),
        master=message.get("master"),
    )
