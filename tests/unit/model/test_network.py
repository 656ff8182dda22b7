"""Networks as values."""

from __future__ import annotations

import uuid
from ipaddress import IPv4Network, IPv6Network

import pytest

from vmherd.model.network import INTERFACE_NAME_MAX_LENGTH, Network, check_network, eui64, tap_name

LAB = Network("lab", "lab0", IPv4Network("10.77.0.0/29"), IPv6Network("fd77::/64"))
LAN = Network("lan", "br0")


def test_the_host_has_the_first_address_of_each_subnet() -> None:
    assert (str(LAB.gateway), str(LAB.ipv6_gateway)) == ("10.77.0.1", "fd77::1")
    assert (LAN.gateway, LAN.ipv6_gateway, LAN.subnets) == (None, None, ())


def test_machines_get_the_lowest_free_address_until_there_is_none() -> None:
    taken: list[str] = []
    while address := LAB.free_address(taken):
        taken.append(str(address))
    assert taken == [f"10.77.0.{last}" for last in range(2, 7)]
    taken.remove("10.77.0.4")
    assert str(LAB.free_address(taken)) == "10.77.0.4"
    assert LAN.free_address([]) is None


def test_an_ipv6_address_follows_from_the_mac_address() -> None:
    # The example of RFC 4291, appendix A, has the global bit set, as 34-56-78-9A-BC-DE has.
    assert str(eui64(IPv6Network("fd77::/64"), "34:56:78:9a:bc:de")) == "fd77::3656:78ff:fe9a:bcde"
    assert str(LAB.ipv6_of("52:54:00:00:00:07")) == "fd77::5054:ff:fe00:7"
    assert LAN.ipv6_of("52:54:00:00:00:07") is None


def test_the_names_of_tap_devices_fit_and_differ() -> None:
    uids = [str(uuid.UUID(int=number)) for number in range(100)]
    names = {tap_name(uid, index) for uid in uids for index in range(8)}
    assert len(names) == 800
    assert max(map(len, names)) <= INTERFACE_NAME_MAX_LENGTH


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        (LAB, []),
        (LAN, []),
        (Network("user", "br0"), ["name"]),
        (Network("none", "br0"), ["name"]),
        (Network("La b", "br0"), ["name"]),
        (Network("lab", "a-bridge-too-long"), ["bridge"]),
        (Network("lab", "br 0"), ["bridge"]),
        (Network("lab", 'br"; drop'), ["bridge"]),
        (Network("lab", "br0\n"), ["bridge"]),
        (Network("lab", "..", IPv4Network("10.0.0.0/24")), ["bridge"]),
        (Network("lab", "br0", IPv4Network("10.0.0.0/8")), ["subnet"]),
        (Network("lab", "br0", IPv4Network("10.0.0.0/30")), ["subnet"]),
        (Network("lab", "br0", IPv4Network("0.0.0.0/16")), ["subnet"]),
        (Network("lab", "br0", IPv4Network("127.1.0.0/24")), ["subnet"]),
        (Network("lab", "br0", IPv4Network("169.254.0.0/24")), ["subnet"]),
        (Network("lab", "br0", IPv4Network("224.0.0.0/24")), ["subnet"]),
        (Network("lab", "br0", IPv4Network("240.0.0.0/24")), ["subnet"]),
        (Network("lab", "br0", IPv4Network("10.0.0.0/24"), IPv6Network("fd00::/48")), ["ipv6_subnet"]),
        (Network("lab", "br0", IPv4Network("10.0.0.0/24"), IPv6Network("2001:db8::/64")), ["ipv6_subnet"]),
        (Network("lan", "br0", isolated=True, host_access=True), ["isolated", "host_access"]),
        (Network("lan", "br0", ipv6_subnet=IPv6Network("fd00::/64")), ["ipv6_subnet"]),
    ],
)
def test_what_is_wrong_with_a_network_is_named(network: Network, fields: list[str]) -> None:
    assert [violation.field for violation in check_network(network, "n")] == [f"n.{field}" for field in fields]
