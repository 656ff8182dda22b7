"""What a new instance is plugged into, and which addresses it gets."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.controller.interfaces import assigned
from vmherd.model.errors import InvalidArgument, ResourceExhausted
from vmherd.model.instance import Hardware, Instance, NetworkInterface
from vmherd.model.machine import PortForward, Protocol, mac_of
from vmherd.model.network import Network

UID = "6b6a2c52-93f5-4a6c-8d3e-7f1f1c7f6f01"
LAB = Network("lab", "vmbr0", IPv4Network("10.20.0.0/29"), IPv6Network("fd00:20::/64"))
DMZ = Network("dmz", "vmbr1", IPv4Network("10.30.0.0/24"))
OFFICE = Network("office", "br0")
NETWORKS = (LAB, DMZ, OFFICE)
MAC = "52:00:00:00:00:01"
SSH = (PortForward(Protocol.TCP, 22),)


def of(name: str, *nics: NetworkInterface) -> Instance:
    return Instance(name, "uid", "builtin", Hardware(1, 128), {}, 0.0, nics=nics)


def violations(nic: NetworkInterface, *others: Instance) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArgument) as refused:
        assigned([nic], UID, NETWORKS, others)
    return [(violation.field, violation.description) for violation in refused.value.violations]


def test_who_asks_for_nothing_is_plugged_into_the_first_network() -> None:
    [nic] = assigned((), UID, NETWORKS, ())
    mac = mac_of(UID)
    assert nic == NetworkInterface("lab", mac, "10.20.0.2", str(LAB.ipv6_of(mac)))


def test_who_asks_for_nothing_on_a_host_without_networks_gets_qemus_own() -> None:
    assert assigned((), UID, (), ()) == (NetworkInterface("user", mac_of(UID)),)


def test_none_is_none() -> None:
    assert assigned([NetworkInterface("none")], UID, NETWORKS, ()) == ()


def test_several_at_once() -> None:
    asked = [
        NetworkInterface("dmz"),
        NetworkInterface("user", forwards=SSH),
        NetworkInterface("office", MAC),
        NetworkInterface("dmz", ipv4_address="10.30.0.2"),
        NetworkInterface("lab"),
    ]
    assert assigned(asked, UID, NETWORKS, [of("other", NetworkInterface("lab", MAC[:-1] + "9", "10.20.0.2"))]) == (
        NetworkInterface("dmz", mac_of(UID, 0), "10.30.0.3"),
        NetworkInterface("user", mac_of(UID, 1), forwards=SSH),
        NetworkInterface("office", MAC),
        NetworkInterface("dmz", mac_of(UID, 3), "10.30.0.2"),
        NetworkInterface("lab", mac_of(UID, 4), "10.20.0.3", str(LAB.ipv6_of(mac_of(UID, 4)))),
    )


@pytest.mark.parametrize(
    ("nic", "field", "why"),
    [
        (NetworkInterface("nowhere"), "network", "must be one of lab, dmz, office, user, none, is 'nowhere'"),
        (NetworkInterface("lab", forwards=SSH), "forwards", "are for 'user'"),
        (NetworkInterface("user", ipv4_address="10.20.0.3"), "ipv4_address", "is for a network of the host"),
        (NetworkInterface("office", ipv4_address="10.20.0.3"), "ipv4_address", "somebody else gives addresses"),
        (NetworkInterface("lab", ipv4_address="10.20.0.1"), "ipv4_address", "the host's own address"),
        (NetworkInterface("lab", ipv4_address="10.20.0.0"), "ipv4_address", "from 10.20.0.2 to 10.20.0.6"),
        (NetworkInterface("lab", ipv4_address="10.20.0.7"), "ipv4_address", "from 10.20.0.2 to 10.20.0.6"),
        (NetworkInterface("lab", ipv4_address="10.20.0.8"), "ipv4_address", "from 10.20.0.2 to 10.20.0.6"),
        (NetworkInterface("lab", ipv4_address="10.30.0.5"), "ipv4_address", "on the network 'lab', is 10.30.0.5"),
    ],
)
def test_what_does_not_fit_the_host_is_named(nic: NetworkInterface, field: str, why: str) -> None:
    [(wrong, description)] = violations(nic)
    assert wrong == f"nics[0].{field}"
    assert why in description


def test_what_another_instance_has_is_its_own_on_whatever_state_it_is() -> None:
    other = of("db", NetworkInterface("lab", MAC, "10.20.0.3"))
    assert violations(NetworkInterface("dmz", MAC), other) == [("nics[0].mac", f"{MAC} is that of 'db'")]
    [(field, why)] = violations(NetworkInterface("lab", ipv4_address="10.20.0.3"), other)
    assert field == "nics[0].ipv4_address"
    assert "10.20.0.3 is that of 'db', which keeps it until it is deleted" in why
    [nic] = assigned([NetworkInterface("dmz", ipv4_address="10.30.0.3")], UID, NETWORKS, [other])
    assert nic.ipv4_address == "10.30.0.3"


def test_one_instance_has_nothing_twice() -> None:
    twice = [NetworkInterface("lab", MAC, "10.20.0.3"), NetworkInterface("", MAC, "10.20.0.3")]
    with pytest.raises(InvalidArgument) as refused:
        assigned(twice, UID, NETWORKS, ())
    assert [violation.field for violation in refused.value.violations] == [
        f"nics[{index}].{name}" for index in (0, 1) for name in ("mac", "ipv4_address")
    ]


def test_a_network_without_a_free_address_says_what_to_do() -> None:
    others = [of(f"vm{n}", NetworkInterface("lab", mac_of(UID, n), f"10.20.0.{n}")) for n in range(2, 7)]
    with pytest.raises(ResourceExhausted, match=r"'lab' has no address left in 10\.20\.0\.0/29; .*delete one") as full:
        assigned((), UID, NETWORKS, others)
    assert full.value.metadata == {"network": "lab", "subnet": "10.20.0.0/29"}
    [nic] = assigned((), UID, NETWORKS, others[1:])
    assert nic.ipv4_address == "10.20.0.2"


@given(st.lists(st.sampled_from(["lab", "dmz", "user", "office", ""]), max_size=8))
def test_addresses_are_never_given_twice(names: list[str]) -> None:
    others: list[Instance] = []
    for index, name in enumerate(names):
        uid = f"{index:08x}-93f5-4a6c-8d3e-7f1f1c7f6f01"
        try:
            others.append(of(f"vm{index}", *assigned([NetworkInterface(name)] * 2, uid, NETWORKS, others)))
        except ResourceExhausted:
            assert sum(nic.network == "lab" for other in others for nic in other.nics) >= 4
    given_ = [(nic.network, nic.ipv4_address) for other in others for nic in other.nics if nic.ipv4_address]
    assert len(set(given_)) == len(given_)
