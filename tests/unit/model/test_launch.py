"""What a launch may ask for, without regard to any host."""

from __future__ import annotations

import pytest

from vmherd.model.instance import LaunchSpec, NetworkInterface, check_launch
from vmherd.model.machine import PortForward, Protocol

SSH = PortForward(Protocol.TCP, 22)
NIC = NetworkInterface


def violations(*nics: NetworkInterface) -> list[str]:
    return [violation.field for violation in check_launch(LaunchSpec("web", nics=nics))]


@pytest.mark.parametrize(
    "nics",
    [
        (),
        (NIC(),),
        (NIC("none"),),
        (NIC("user", forwards=(SSH, PortForward(Protocol.TCP, 22, 8022), PortForward(Protocol.UDP, 53, 8022))),),
        (NIC("lab", "52:00:00:00:00:01", "10.20.0.9"), NIC("user")),
        (NIC(),) * 8,
    ],
)
def test_network_interfaces_that_can_be_asked_for(nics: tuple[NetworkInterface, ...]) -> None:
    assert violations(*nics) == []


@pytest.mark.parametrize(
    ("nic", "field"),
    [
        (NIC("Lab"), ".network"),
        (NIC("lab,ifname=x"), ".network"),
        (NIC(mac="01:00:5e:00:00:01"), ".mac"),
        (NIC(mac="52:00"), ".mac"),
        (NIC(ipv4_address="10.20.0.256"), ".ipv4_address"),
        (NIC(ipv4_address="10.20.0.2/24"), ".ipv4_address"),
        (NIC(ipv4_address="fd00::1"), ".ipv4_address"),
        (NIC(ipv6_address="fd00::1"), ".ipv6_address"),
        (NIC(forwards=(PortForward(Protocol.TCP, 0),)), ".forwards[0].guest_port"),
        (NIC(forwards=(SSH, PortForward(Protocol.TCP, 22, 65536))), ".forwards[1].host_port"),
        (NIC(forwards=(PortForward(Protocol.TCP, 22, 80), PortForward(Protocol.TCP, 23, 80))), ".forwards"),
        (NIC("none", "52:00:00:00:00:01"), ""),
        (NIC("none", forwards=(SSH,)), ""),
    ],
)
def test_network_interfaces_with_one_thing_wrong(nic: NetworkInterface, field: str) -> None:
    assert violations(nic) == [f"nics[0]{field}"]
    assert violations(NIC(), nic) == [f"nics[1]{field}", *(["nics"] if nic.network == "none" else [])]


def test_none_is_given_alone() -> None:
    assert violations(NIC("none"), NIC("none")) == ["nics"]


def test_too_many_are_too_many() -> None:
    assert violations(*[NIC()] * 9) == ["nics"]


def test_two_interfaces_do_not_share_a_port_of_the_host() -> None:
    tcp, udp = (NIC("user", forwards=(PortForward(protocol, 22, 8022),)) for protocol in Protocol)
    assert violations(tcp, udp) == []
    assert violations(tcp, udp, tcp) == ["nics"]
