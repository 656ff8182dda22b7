"""The firewall of a network as text. What it does to frames and packets is shown in `tests/integration/network`."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network

import pytest

from tests.framework.netns import namespaces, needs_root
from vmherd.model.network import INTERFACE_NAME_MAX_LENGTH, Network
from vmherd.qemu.network.rules import Port, port_added, port_removed, removal, ruleset

LAB = Network("lab", "lab0", IPv4Network("10.77.0.0/24"), IPv6Network("fd77::/64"))
WEB = Port("lab", "vm0123456789", "52:54:00:00:00:07", "10.77.0.7", "fd77::5054:ff:fe00:7")
DB = Port("lab", "vm9876543210", "52:54:00:00:00:08", "10.77.0.8", "fd77::5054:ff:fe00:8")


def test_a_port_may_use_its_own_addresses() -> None:
    assert port_added("lab0", WEB).splitlines() == [
        'add element inet vmherd-lab0 ports { "vm0123456789" }',
        'add element bridge vmherd-lab0 ports { "vm0123456789" }',
        'add element bridge vmherd-lab0 macs { "vm0123456789" . 52:54:00:00:00:07 }',
        'add element bridge vmherd-lab0 ipv4 { "vm0123456789" . 10.77.0.7 }',
        'add element bridge vmherd-lab0 ipv6 { "vm0123456789" . fe80::5054:ff:fe00:7, '
        '"vm0123456789" . fd77::5054:ff:fe00:7 }',
        'add element bridge vmherd-lab0 targets { "vm0123456789" . 0xfe80000000000000505400fffe000007, '
        '"vm0123456789" . 0xfd77000000000000505400fffe000007 }',
        'add element bridge vmherd-lab0 clients { "vm0123456789" . 0x525400000007 }',
    ]


def test_a_port_without_ipv6_may_use_none() -> None:
    assert "ipv6" not in port_added("lab0", replace(WEB, ipv6_address=""))


@pytest.mark.parametrize(
    ("network", "rule", "there"),
    [
        (LAB, "iifname lab0 oifname lab0 accept", True),
        (replace(LAB, isolated=True), "iifname lab0 oifname lab0 drop", True),
        (LAB, "icmp type echo-request accept", True),
        (replace(LAB, host_access=True), "icmp type echo-request accept", False),
        (LAB, "ip6 saddr fd77::/64 ip6 daddr != fd77::/64 oifname != lab0 masquerade", True),
        (
            replace(LAB, ipv6_subnet=None),
            "ip6 saddr fd77::/64 ip6 daddr != fd77::/64 oifname != lab0 masquerade",
            False,
        ),
    ],
)
def test_the_border_is_as_the_settings_say(network: Network, rule: str, there: bool) -> None:
    lines = [line.strip().replace('"', "") for line in ruleset(network, []).splitlines()]
    assert (rule in lines) is there


@needs_root
def test_nft_takes_all_of_it_in_any_order_and_gives_it_back() -> None:
    longest = "b" * INTERFACE_NAME_MAX_LENGTH
    with namespaces(1) as [host]:
        for network in (LAB, replace(LAB, bridge=longest, ipv6_subnet=None), replace(LAB, host_access=True)):
            host.run("nft", "-f", "-", text=removal(network.bridge))
            host.run("nft", "-f", "-", text=ruleset(network, [WEB, DB]))
            whole = host.run("nft", "list", "ruleset")
            host.run("nft", "-f", "-", text=ruleset(network, [WEB]))
            for _ in range(2):
                host.run("nft", "-f", "-", text=port_added(network.bridge, DB))
            assert host.run("nft", "list", "ruleset") == whole
            host.run("nft", "-f", "-", text=port_removed(network.bridge, DB))
            assert DB.tap not in host.run("nft", "list", "ruleset")
            host.run("nft", "-f", "-", text=removal(network.bridge))
            assert host.run("nft", "list", "ruleset") == ""
