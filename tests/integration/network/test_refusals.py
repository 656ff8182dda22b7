"""Hosts, settings and machines that do not fit: each is refused with what is wrong, and nothing changes."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from tests.framework.netns import needs_root
from tests.integration.network.world import LAB, Refused, World, eventually

pytestmark = needs_root

OTHER = "52:54:00:00:00:08"


@pytest.mark.parametrize("route", ["10.77.0.0/16", "10.77.0.128/25"])
def test_a_subnet_that_overlaps_a_route_of_the_host(world: World, route: str) -> None:
    world.outside()
    world.host.ip("route", "add", route, "via", "203.0.113.9")
    with pytest.raises(Refused, match=f"10.77.0.0/24 overlaps the host's route to {route}"):
        world.start(LAB)
    assert world.links() == ["up1"]
    assert world.tables() == []


def test_an_ipv6_network_where_the_host_has_its_own_routes_from_a_router(world: World) -> None:
    world.outside()
    world.host.ip("-6", "route", "add", "default", "via", "fe80::9", "dev", "up1", "proto", "ra")
    with pytest.raises(Refused, match=r"up1.*accept_ra=2"):
        world.start(LAB | {"ipv6_subnet": "fd77::/64"})
    assert world.links() == ["up1"]
    world.restart(LAB)


def test_a_bridge_that_is_somebody_elses(world: World) -> None:
    world.host.ip("link", "add", "lab0", "type", "bridge")
    with pytest.raises(Refused, match="lab0 exists and is not this helper's"):
        world.start(LAB)
    world.end()
    world.spawn()
    world.ask("teardown")
    assert world.links() == ["lab0"]
    world.host.ip("link", "del", "lab0")


def test_a_bridge_of_somebody_else_that_is_missing_matters_to_its_machines_alone(world: World) -> None:
    world.start(LAB, {"name": "lan", "bridge": "br0"})
    with pytest.raises(Refused, match="there is no bridge br0"):
        world.launch("web", network="lan")
    world.launch("web", "10.77.0.2")


@pytest.mark.parametrize(("port", "kind"), [(53, socket.SOCK_STREAM), (67, socket.SOCK_DGRAM)])
def test_a_port_that_dnsmasq_needs_is_taken(world: World, port: int, kind: socket.SocketKind) -> None:
    def taken() -> socket.socket:
        it = socket.socket(socket.AF_INET, kind)
        it.bind(("0.0.0.0", port))
        if kind == socket.SOCK_STREAM:
            it.listen()
        return it

    with world.host.call(taken), pytest.raises(Refused, match=r"dnsmasq does not start: .*in use"):
        world.start(LAB)


def test_a_directory_that_dnsmasq_cannot_reach(world: World) -> None:
    world.directory.chmod(0o700)
    with pytest.raises(Refused, match=f"chmod o\\+x {world.directory}"):
        world.start(LAB)
    assert world.links() == []


def test_a_second_helper_with_the_same_directory(world: World) -> None:
    world.start(LAB)
    first = world.process, world.peer
    with pytest.raises(Refused, match="another helper keeps the networks"):
        world.start()
    world.end()
    world.process, world.peer = first


@pytest.mark.parametrize(
    ("nic", "why"),
    [
        ({"network": "lob"}, "'lob' is not a network of this host, which has lab"),
        ({"ipv4_address": ""}, "must be in 10.77.0.0/24"),
        ({"ipv4_address": "10.77.0.1"}, "not the host's 10.77.0.1"),
        ({"ipv4_address": "10.77.0.0"}, "must be in 10.77.0.0/24"),
        ({"ipv4_address": "10.77.0.255"}, "must be in 10.77.0.0/24"),
        ({"ipv4_address": "10.78.0.2"}, "must be in 10.77.0.0/24"),
        ({"ipv4_address": "10.77.0.2"}, "10.77.0.2 on network 'lab' belongs to 'web'"),
        ({"mac": "52:54:00:00:00:07"}, "52:54:00:00:00:07 on network 'lab' belongs to 'web'"),
    ],
)
def test_a_machine_that_does_not_fit(world: World, nic: dict[str, Any], why: str) -> None:
    world.start(LAB)
    web = {"mac": "52:54:00:00:00:07", "network": "lab", "ipv4_address": "10.77.0.2"}
    _, [tap] = world._ask("plug", {"uid": "1", "name": "web", "nics": [web]})
    before = world.ruleset(), world.links()
    with pytest.raises(Refused, match=why):
        world.ask(
            "plug", uid="2", name="db", nics=[{"mac": OTHER, "network": "lab", "ipv4_address": "10.77.0.9"} | nic]
        )
    assert (world.ruleset(), world.links()) == before
    os.close(tap)


def test_a_plug_that_fails_half_way_leaves_nothing(world: World) -> None:
    world.start(LAB, {"name": "lan", "bridge": "br0"})
    before = world.ruleset(), world.links()
    nics = [{"mac": OTHER, "network": "lab", "ipv4_address": "10.77.0.2"}, {"mac": OTHER, "network": "lan"}]
    with pytest.raises(Refused, match="there is no bridge br0"):
        world.ask("plug", uid="1", name="web", nics=nics)
    assert world.links() == before[1]
    eventually(lambda: world.ruleset() == before[0])
    eventually(lambda: (world.run / "lab0" / "hosts").read_text() == "")
    world.launch("web", "10.77.0.2")
