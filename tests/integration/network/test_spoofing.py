"""What a guest sends in another's name does not get through; what it sends in its own does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network

import pytest

from tests.framework.netns import needs_root
from tests.integration.network.traffic import (
    ARP,
    BROADCAST,
    IPV4,
    IPV6,
    REFUSAL_S,
    TIMEOUT_S,
    arp,
    arrived,
    dhcp,
    dhcp_message,
    frame,
    icmp6,
    listening,
    mac_bytes,
    raw_socket,
    reaches,
    udp4,
)
from tests.integration.network.world import LAB, Guest, World, world
from vmherd.model.network import eui64

pytestmark = needs_root

STRANGER = "52:54:00:12:34:56"
ALL_NODES = "ff02::1"
FAR = "fd77::dead"


@pytest.fixture(scope="module")
def guests() -> Iterator[tuple[World, Guest, Guest]]:
    with world() as it:
        it.start(LAB | {"ipv6_subnet": "fd77::/64"})
        yield it, it.configured("eve", "10.77.0.66"), it.configured("bob", "10.77.0.2")


def link_local(guest: Guest) -> str:
    return str(eui64(IPv6Network("fe80::/64"), guest.mac))


def target(address: str) -> bytes:
    return bytes(4) + IPv6Address(address).packed


def forged(eve: Guest, bob: Guest) -> dict[str, bytes]:
    payload = b"x" * 64
    own = udp4(eve.address, "10.77.0.255", 9, 9, payload)
    foreign = udp4(bob.address, "10.77.0.255", 9, 9, payload)
    vlan = b"\x00\x05" + IPV4.to_bytes(2, "big") + foreign
    return {
        "a foreign MAC address": frame(STRANGER, IPV4, own),
        "the neighbour's MAC address": frame(bob.mac, IPV4, own),
        "the neighbour's IPv4 address": frame(eve.mac, IPV4, foreign),
        "the host's IPv4 address": frame(eve.mac, IPV4, udp4("10.77.0.1", "10.77.0.255", 9, 9, payload)),
        "no IPv4 address": frame(eve.mac, IPV4, udp4("0.0.0.0", "10.77.0.255", 9, 9, payload)),
        "an IPv4 address in a VLAN": frame(eve.mac, 0x8100, vlan),
        "an IPv4 address in a provider's VLAN": frame(eve.mac, 0x88A8, vlan),
        "ARP for the neighbour's address": frame(eve.mac, ARP, arp(eve.mac, bob.address, eve.address)),
        "ARP answer for the host's address": frame(eve.mac, ARP, arp(eve.mac, "10.77.0.1", bob.address, operation=2)),
        "ARP with a foreign MAC address": frame(eve.mac, ARP, arp(STRANGER, eve.address, bob.address)),
        "ARP probe for the neighbour's address": frame(eve.mac, ARP, arp(eve.mac, "0.0.0.0", bob.address)),
        "a DHCP server's answer": frame(eve.mac, IPV4, udp4(eve.address, "255.255.255.255", 67, 68, payload)),
        "a DHCP server's answer from another port": frame(
            eve.mac, IPV4, udp4(eve.address, "255.255.255.255", 6767, 68, payload)
        ),
        "a question to a DHCP server in the neighbour's name": frame(eve.mac, IPV4, dhcp_message(bob.mac, 1)),
        "a question to a DHCP server that names nobody": frame(
            eve.mac, IPV4, udp4("0.0.0.0", "255.255.255.255", 68, 67, payload[:20])
        ),
        "a question to a DHCP server from its own address in the neighbour's name": frame(
            eve.mac, IPV4, udp4(eve.address, "255.255.255.255", 68, 67, dhcp_message(bob.mac, 3)[28:])
        ),
        "the neighbour's IPv6 address": frame(eve.mac, IPV6, icmp6(bob.ipv6_address, ALL_NODES, 128, payload)),
        "the neighbour's link-local address": frame(eve.mac, IPV6, icmp6(link_local(bob), ALL_NODES, 128, payload)),
        "an IPv6 address of its own choice": frame(eve.mac, IPV6, icmp6(FAR, ALL_NODES, 128, payload)),
        "a router advertisement": frame(
            eve.mac, IPV6, icmp6(link_local(eve), ALL_NODES, 134, bytes([64, 0, 7, 8]) + bytes(8))
        ),
        "a redirect": frame(eve.mac, IPV6, icmp6(link_local(eve), ALL_NODES, 137, bytes(36))),
        "a neighbour advertisement for the neighbour": frame(
            eve.mac, IPV6, icmp6(link_local(eve), ALL_NODES, 136, target(bob.ipv6_address))
        ),
        "a solicitation that denies the neighbour its address": frame(
            eve.mac, IPV6, icmp6("::", ALL_NODES, 135, target(bob.ipv6_address))
        ),
        "another protocol": frame(eve.mac, 0x88CC, payload),
        "a frame with a length": frame(eve.mac, 64, b"\x42\x42\x03" + payload),
    }


def honest(eve: Guest, bob: Guest) -> dict[str, bytes]:
    payload = b"x" * 64
    return {
        "IPv4": frame(eve.mac, IPV4, udp4(eve.address, "10.77.0.255", 9, 9, payload)),
        "ARP": frame(eve.mac, ARP, arp(eve.mac, eve.address, bob.address)),
        "ARP answer": frame(eve.mac, ARP, arp(eve.mac, eve.address, bob.address, operation=2)),
        "ARP probe": frame(eve.mac, ARP, arp(eve.mac, "0.0.0.0", eve.address)),
        "DHCP client": frame(eve.mac, IPV4, dhcp_message(eve.mac, 1)),
        "DHCP client that has an address": frame(
            eve.mac, IPV4, udp4(eve.address, "10.77.0.1", 68, 67, dhcp_message(eve.mac, 3)[28:])
        ),
        "IPv6": frame(eve.mac, IPV6, icmp6(eve.ipv6_address, ALL_NODES, 128, payload)),
        "link-local IPv6": frame(eve.mac, IPV6, icmp6(link_local(eve), ALL_NODES, 128, payload)),
        "neighbour advertisement": frame(
            eve.mac, IPV6, icmp6(eve.ipv6_address, ALL_NODES, 136, target(eve.ipv6_address))
        ),
        "duplicate address detection": frame(eve.mac, IPV6, icmp6("::", ALL_NODES, 135, target(link_local(eve)))),
        "router solicitation": frame(eve.mac, IPV6, icmp6(link_local(eve), ALL_NODES, 133, bytes(4))),
    }


def test_forged_frames_are_cut_off_and_honest_ones_come_through(guests: tuple[World, Guest, Guest]) -> None:
    _, eve, bob = guests
    marker = frame(eve.mac, IPV4, udp4(eve.address, "10.77.0.255", 9, 9, b"the end of the test" * 4), BROADCAST)
    with raw_socket(eve.namespace) as sender, raw_socket(bob.namespace) as receiver:
        bad = forged(eve, bob)
        came = arrived(sender, receiver, list(bad.values()), marker)
        assert [name for name, data in bad.items() if data in came] == []
        good = honest(eve, bob)
        came = arrived(sender, receiver, list(good.values()), marker)
        assert [name for name, data in good.items() if data not in came] == []


def test_forged_frames_do_not_reach_the_host_either(guests: tuple[World, Guest, Guest]) -> None:
    it, eve, bob = guests
    host = next(line.split()[1] for line in it.host.ip("link", "show", "lab0").splitlines() if "link/ether" in line)
    marker = frame(eve.mac, IPV4, udp4(eve.address, "10.77.0.1", 9, 9, b"the end of the test" * 4), host)
    unicast = {name: mac_bytes(host) + data[6:] for name, data in forged(eve, bob).items()}
    with raw_socket(eve.namespace) as sender, raw_socket(it.host, "lab0") as receiver:
        assert arrived(sender, receiver, list(unicast.values()), marker) == []
    assert STRANGER not in it.host.ip("neigh", "show", "dev", "lab0")


def test_nobody_can_decline_another_s_address(guests: tuple[World, Guest, Guest]) -> None:
    _, eve, bob = guests
    addresses = b"\x32\x04" + IPv4Address(bob.address).packed + b"\x36\x04" + IPv4Address("10.77.0.1").packed
    with raw_socket(eve.namespace) as sender:
        sender.send(frame(eve.mac, IPV4, dhcp_message(bob.mac, 4, addresses)))
    assert socket.inet_ntoa(dhcp(bob.namespace, bob.mac)[0]) == bob.address


@pytest.mark.parametrize("last", range(16))
def test_what_a_bridge_leaves_to_its_ports_does_not_reach_the_host(
    guests: tuple[World, Guest, Guest], last: int
) -> None:
    """Frames for these addresses would come from the TAP device, of which no rule of the host knows."""
    it, eve, _ = guests
    reserved = f"01:80:c2:00:00:{last:02x}"
    router = bytes([64, 0, 7, 8]) + bytes(8) + bytes([3, 4, 64, 192]) + b"\0\0\x1c\x20" * 2 + bytes(4)
    prefix = IPv6Address("2001:db8:bad::").packed
    with (
        raw_socket(eve.namespace) as sender,
        it.host.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as service,
    ):
        service.bind(("0.0.0.0", 999))
        service.settimeout(TIMEOUT_S)
        for source in (eve.address, "198.51.100.1", "0.0.0.0"):
            for target in ("10.77.0.1", "255.255.255.255"):
                sender.send(frame(eve.mac, IPV4, udp4(source, target, 9, 999, b"from a guest"), reserved))
        advertisement = icmp6(link_local(eve), ALL_NODES, 134, router + prefix)
        sender.send(frame(eve.mac, IPV6, advertisement, reserved))
        # What comes after it in the same queue tells that it has had its time.
        marker = frame(eve.mac, IPV4, udp4(eve.address, "10.77.0.1", 9, 9, b"the end of the test" * 4), BROADCAST)
        with raw_socket(it.host, "lab0") as receiver:
            arrived(sender, receiver, [], marker)
        with it.host.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as host:
            host.sendto(b"the last", ("127.0.0.1", 999))
        assert service.recv(100) == b"the last"
    assert "2001:db8:bad" not in it.host.ip("-6", "route") + it.host.ip("-6", "addr")
    assert "default" not in it.host.ip("-6", "route")


def test_a_guest_that_changes_its_mac_or_address_is_cut_off_until_it_changes_back(
    guests: tuple[World, Guest, Guest],
) -> None:
    _, eve, bob = guests
    with listening(bob.namespace, bob.address):
        assert reaches(eve.namespace, bob.address, 7)
        eve.namespace.ip("link", "set", "eth0", "address", STRANGER)
        assert not reaches(eve.namespace, bob.address, 7, timeout_s=REFUSAL_S)
        eve.namespace.ip("link", "set", "eth0", "address", eve.mac)
        assert reaches(eve.namespace, bob.address, 7)
        eve.namespace.ip("addr", "flush", "dev", "eth0")
        eve.namespace.ip("addr", "add", "10.77.0.67/24", "dev", "eth0")
        assert not reaches(eve.namespace, bob.address, 7, timeout_s=REFUSAL_S)
        eve.namespace.ip("addr", "flush", "dev", "eth0")
        eve.namespace.ip("addr", "add", f"{eve.address}/24", "dev", "eth0")
        assert reaches(eve.namespace, bob.address, 7)
