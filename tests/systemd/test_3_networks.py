"""A network of the host, with addresses that come by themselves."""

from __future__ import annotations

import ipaddress
import json

import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S
from tests.systemd.hypervisor import LAUNCH_TIMEOUT_S, Hypervisor

pytestmark = pytest.mark.timeout(2 * TEST_TIMEOUT_S)

SETTINGS = "/etc/vmherd/qemu.json"
NETWORK = {"name": "lan", "bridge": "vmbr0", "subnet": "10.20.30.0/24"}


@pytest.fixture(autouse=True, scope="module")
def lan(host: Hypervisor) -> None:
    before = host.life("inner")
    settings = json.loads(host.shell(f"cat {SETTINGS}"))
    host.shell(f"echo '{json.dumps(settings | {'networks': [NETWORK]})}' >{SETTINGS}")
    host.shell("systemctl restart vmherd-qemu")
    assert host.life("inner") == before


def test_a_machine_gets_its_address(host: Hypervisor) -> None:
    host.vmherd(f"launch wired --network lan --timeout {LAUNCH_TIMEOUT_S:g}")
    addresses = [it["address"] for it in host.instance("wired")["addresses"]]
    assert any(ipaddress.ip_address(address) in ipaddress.ip_network(NETWORK["subnet"]) for address in addresses)
    inside = host.run("wired", "ip", "address")
    assert any(address in inside for address in addresses)
    host.shell(f"ping -c 1 -W 10 {addresses[0]}")
    host.run("wired", "ping", "-c", "1", "-W", "10", "10.20.30.1")


def test_it_keeps_its_network_while_the_helper_restarts(host: Hypervisor) -> None:
    before = host.life("wired")
    host.shell("systemctl restart vmherd-qemu")
    host.run("wired", "ping", "-c", "1", "-W", "10", "10.20.30.1")
    assert host.life("wired") == before


def test_rules_that_somebody_flushed_come_back(host: Hypervisor) -> None:
    assert "vmherd-vmbr0" in host.shell("nft list tables")
    host.shell("nft flush ruleset")
    host.eventually(lambda: "vmherd-vmbr0" in host.shell("nft list tables"), 30)


def test_what_is_left_after_it(host: Hypervisor) -> None:
    host.vmherd("delete wired --force")
    assert host.shell("ip -brief link show master vmbr0") == ""
    assert host.shell("systemctl list-units --plain --no-legend --type=scope 'vmherd*'").count(".scope") == 1
