"""Guests on a network: their addresses and names, each other, the host and the world."""

from __future__ import annotations

import socket

import pytest

from tests.framework.netns import needs_root
from tests.integration.network.traffic import REFUSAL_S, dhcp, listening, lookup, reaches
from tests.integration.network.world import LAB, World, eventually

pytestmark = needs_root


def test_guests_get_their_addresses_and_names_and_reach_each_other(world: World) -> None:
    world.start(LAB)
    web, db = world.launch("web", "10.77.0.2"), world.launch("db", "10.77.0.9")
    for guest in (web, db):
        offer = dhcp(guest.namespace, guest.mac)
        assert socket.inet_ntoa(offer[0]) == guest.address
        assert socket.inet_ntoa(offer[1]) == "255.255.255.0"
        assert socket.inet_ntoa(offer[3]) == socket.inet_ntoa(offer[6]) == "10.77.0.1"
        assert offer[15] == b"vmherd"
        guest.namespace.ip("addr", "add", f"{guest.address}/24", "dev", "eth0")
    assert lookup(web.namespace, "10.77.0.1", "db.vmherd") == ["10.77.0.9"]
    assert lookup(db.namespace, "10.77.0.1", "web.vmherd") == ["10.77.0.2"]
    with listening(db.namespace, db.address):
        assert reaches(web.namespace, db.address, 7)


def test_addresses_come_from_the_lease_and_then_from_the_neighbours(world: World) -> None:
    world.start(LAB)
    web = world.launch("web", "10.77.0.2")
    assert world.ask("addresses", uid=web.uid) == []
    web.namespace.ip("addr", "add", "10.77.0.2/24", "dev", "eth0")
    with listening(world.host, "10.77.0.1"):
        reaches(web.namespace, "10.77.0.1", 7, timeout_s=0.1)
    expected = {"address": "10.77.0.2", "prefix_length": 24, "mac": web.mac, "source": "neighbour"}
    eventually(lambda: world.ask("addresses", uid=web.uid) == [expected])
    dhcp(web.namespace, web.mac)
    assert world.ask("addresses", uid=web.uid) == [expected | {"source": "lease"}]


def test_the_next_machine_with_an_address_gets_it_although_the_last_one_never_gave_it_back(world: World) -> None:
    world.start(LAB)
    first = world.launch("first", "10.77.0.2")
    dhcp(first.namespace, first.mac)
    first.power_off()
    world.ask("unplug", uid=first.uid)
    second = world.launch("second", "10.77.0.2")
    assert socket.inet_ntoa(dhcp(second.namespace, second.mac)[0]) == "10.77.0.2"
    assert lookup(world.host, "10.77.0.1", "first.vmherd") == []
    assert lookup(world.host, "10.77.0.1", "second.vmherd") == ["10.77.0.2"]


def test_what_a_machine_had_when_it_last_ran_is_not_taken_for_what_it_has(world: World) -> None:
    world.start(LAB)
    web = world.configured("web", "10.77.0.2")
    dhcp(web.namespace, web.mac)
    leased = {"address": "10.77.0.2", "prefix_length": 24, "mac": web.mac, "source": "lease"}
    assert world.ask("addresses", uid=web.uid) == [leased]
    reaches(web.namespace, "10.77.0.1", 7, timeout_s=0.1)
    eventually(lambda: web.mac in world.host.ip("neigh"))
    web.power_off()
    world.ask("unplug", uid=web.uid)
    again = world.launch("web", "10.77.0.2", uid=web.uid)
    assert world.ask("addresses", uid=again.uid) == []

    def has_its_own() -> bool:
        dhcp(again.namespace, again.mac)  # within the same second it looks like the old one
        return bool(world.ask("addresses", uid=again.uid) == [leased])

    eventually(has_its_own)
    world.restart()
    assert world.ask("addresses", uid=again.uid) == [leased]


def test_a_stranger_gets_no_address(world: World) -> None:
    world.start(LAB)
    web = world.launch("web", "10.77.0.2")
    dhcp(web.namespace, web.mac)
    assert world.ask("unplug", uid=web.uid) is None
    with pytest.raises(TimeoutError):
        dhcp(web.namespace, web.mac, timeout_s=REFUSAL_S)


def test_a_server_behind_nat_is_reached_and_no_guest_is_reached_from_there(world: World) -> None:
    world.start(LAB)
    outside, web = world.outside(), world.configured("web", "10.77.0.2")
    with listening(outside, "203.0.113.9") as server, listening(web.namespace, web.address):
        with web.namespace.call(lambda: socket.create_connection(("203.0.113.9", 7), 20)):
            connection, (client, _) = server.accept()
            connection.close()
        assert client == "203.0.113.1"
        assert reaches(world.host, web.address, 7)
        assert not reaches(outside, web.address, 7, timeout_s=REFUSAL_S)


def test_networks_do_not_reach_each_other(world: World) -> None:
    world.start(LAB, {"name": "other", "bridge": "other0", "subnet": "10.78.0.0/24"})
    web, db = world.configured("web", "10.77.0.2"), world.configured("db", "10.78.0.2", network="other")
    with listening(db.namespace, db.address), listening(world.host, "10.78.0.1"):
        assert reaches(world.host, db.address, 7)
        assert not reaches(web.namespace, db.address, 7, timeout_s=REFUSAL_S)
        assert not reaches(web.namespace, "10.78.0.1", 7, timeout_s=REFUSAL_S)


@pytest.mark.parametrize("access", [False, True])
def test_services_of_the_host_are_reached_only_with_host_access(world: World, access: bool) -> None:
    world.start(LAB | {"host_access": access})
    web = world.configured("web", "10.77.0.2")
    with listening(world.host, "10.77.0.1"):
        assert reaches(web.namespace, "10.77.0.1", 7, timeout_s=20 if access else REFUSAL_S) is access
    assert lookup(web.namespace, "10.77.0.1", "web.vmherd") == ["10.77.0.2"]


def test_isolated_guests_do_not_reach_each_other_on_any_way(world: World) -> None:
    world.start(LAB | {"isolated": True})
    outside = world.outside()
    web, db = world.configured("web", "10.77.0.2"), world.configured("db", "10.77.0.9")
    assert lookup(web.namespace, "10.77.0.1", "db.vmherd") == ["10.77.0.9"]
    with listening(db.namespace, db.address), listening(outside, "203.0.113.9"):
        assert reaches(world.host, db.address, 7)
        assert reaches(web.namespace, "203.0.113.9", 7)
        assert not reaches(web.namespace, db.address, 7, timeout_s=REFUSAL_S)
        for guest, neighbour in ((web, db), (db, web)):
            guest.namespace.ip("route", "add", f"{neighbour.address}/32", "via", "10.77.0.1")
        assert not reaches(web.namespace, db.address, 7, timeout_s=REFUSAL_S)


def test_ipv6_comes_by_router_advertisement_and_goes_through_nat(world: World) -> None:
    world.start(LAB | {"ipv6_subnet": "fd77::/64"})
    outside = world.outside()
    outside.ip("addr", "add", "2001:db8::9/64", "dev", "eth0", "nodad")
    world.host.ip("addr", "add", "2001:db8::1/64", "dev", "up1", "nodad")
    web, db = world.launch("web", "10.77.0.2"), world.launch("db", "10.77.0.9")
    for guest in (web, db):
        eventually(
            lambda guest=guest: _has(guest.namespace.ip("-6", "addr", "show", "dev", "eth0"), guest.ipv6_address)
        )
    assert lookup(web.namespace, "fd77::1", "db.vmherd", kind=28) == [db.ipv6_address]
    with listening(db.namespace, db.ipv6_address), listening(outside, "2001:db8::9") as server:
        assert reaches(web.namespace, db.ipv6_address, 7)
        assert reaches(web.namespace, "2001:db8::9", 7)
        server.settimeout(20)
        connection, (client, *_) = server.accept()
        connection.close()
        assert client == "2001:db8::1"
        outside.ip("-6", "route", "add", "fd77::/64", "via", "2001:db8::1")
        assert not reaches(outside, db.ipv6_address, 7, timeout_s=REFUSAL_S)


def test_a_bridge_of_somebody_else_gets_ports_and_nothing_more(world: World) -> None:
    world.host.ip("link", "add", "br0", "mtu", "1400", "type", "bridge")
    world.host.ip("addr", "add", "10.79.0.1/24", "dev", "br0")
    world.host.ip("link", "set", "br0", "up")
    world.start({"name": "lan", "bridge": "br0"})
    assert world.tables() == []
    assert world.dnsmasqs() == []
    web = world.launch("web", network="lan")
    web.namespace.ip("addr", "add", "10.79.0.5/24", "dev", "eth0")
    with listening(world.host, "10.79.0.1"):
        assert reaches(web.namespace, "10.79.0.1", 7)
    assert world.ask("addresses", uid=web.uid) == [
        {"address": "10.79.0.5", "prefix_length": 24, "mac": web.mac, "source": "neighbour"}
    ]
    assert "mtu 1400" in world.host.ip("link", "show", "br0")
    web.power_off()
    world.ask("unplug", uid=web.uid)
    world.host.ip("link", "del", "br0")


def test_a_plan_shows_what_a_plug_makes_and_makes_nothing(world: World) -> None:
    world.start(LAB)
    before = world.ruleset(), world.links()
    uid = "0e9b1d3c-5a5f-4a57-8c6c-0d7e1c9f2a10"
    nic = {"mac": "52:54:00:00:00:07", "network": "lab", "ipv4_address": "10.77.0.7"}
    [device], rules = world.ask("plan", uid=uid, name="web", nics=[nic])
    assert (world.ruleset(), world.links()) == before
    web = world.launch("web", "10.77.0.7", uid=uid)
    assert device.startswith(f"TAP {web.device} on bridge lab0 of network lab: ")
    assert any("10.77.0.7" in rule for rule in rules)


def _has(text: str, address: str) -> bool:
    return any(f"{address}/64" in line and "tentative" not in line for line in text.splitlines())
