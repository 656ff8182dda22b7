"""Ends of the helper, of dnsmasq, and other people's hands on the host: machines keep their network."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.framework.netns import needs_root
from tests.integration.network.traffic import dhcp, listening, lookup, reaches
from tests.integration.network.world import LAB, Guest, Refused, World, eventually

pytestmark = needs_root

TUNSETPERSIST = 0x400454CB  # linux/if_tun.h


def works(world: World, web: Guest, db: Guest) -> bool:
    """Whether two guests have everything that a network gives."""
    assert socket.inet_ntoa(dhcp(web.namespace, web.mac)[0]) == web.address
    assert lookup(web.namespace, "10.77.0.1", "db.vmherd") == [db.address]
    with listening(db.namespace, db.address):
        return reaches(web.namespace, db.address, 7)


def pair(world: World) -> tuple[Guest, Guest]:
    return world.configured("web", "10.77.0.2"), world.configured("db", "10.77.0.9")


def test_a_killed_helper_leaves_the_network_at_work_and_the_next_one_adopts_it(world: World) -> None:
    world.start(LAB)
    web, db = pair(world)
    before = world.ruleset(), world.links(), world.dnsmasqs()
    world.end()
    assert works(world, web, db)
    world.start()
    assert (world.ruleset(), world.links(), world.dnsmasqs()) == before
    assert works(world, web, db)
    other = world.launch("other", "10.77.0.3")
    assert socket.inet_ntoa(dhcp(other.namespace, other.mac)[0]) == "10.77.0.3"


def test_an_orderly_end_leaves_the_network_at_work_too(world: World) -> None:
    world.start(LAB)
    web, db = pair(world)
    world.end(signal.SIGTERM)
    assert works(world, web, db)


def test_a_dnsmasq_that_dies_is_started_again_by_the_helper_there_is_or_the_next(world: World) -> None:
    world.start(LAB)
    web, db = pair(world)
    [first] = world.dnsmasqs()
    os.kill(first, signal.SIGKILL)
    [second] = eventually(lambda: [pid for pid in world.dnsmasqs() if pid != first])
    assert eventually((world.run / "lab0" / "own" / "pid").exists)
    assert works(world, web, db)
    world.end()
    os.kill(second, signal.SIGKILL)
    world.start()
    [third] = world.dnsmasqs()
    assert third not in (first, second)
    assert works(world, web, db)


def test_a_machine_that_ended_while_no_helper_was_there_leaves_nothing(world: World) -> None:
    world.start(LAB)
    web, db = pair(world)
    world.end()
    web.power_off()
    world.start()
    assert web.device not in world.ruleset()
    assert lookup(db.namespace, "10.77.0.1", "web.vmherd") == []
    assert world.links() == sorted([db.device, "lab0"])
    again = world.configured("again", "10.77.0.2")
    assert works(world, again, db)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_tap_device_that_its_qemu_made_stay_is_removed(world: World, restarted: bool) -> None:
    """A QEMU that its guest has taken over can do that, and its port would have no rules once it has ended."""
    world.start(LAB)
    web = world.configured("web", "10.77.0.2")
    fcntl.ioctl(web.tap, TUNSETPERSIST, 1)
    if restarted:
        world.end()
    web.power_off()
    assert web.device in world.links()
    if restarted:
        world.start()
    else:
        world.ask("unplug", uid=web.uid)
    assert world.links() == ["lab0"]


def test_a_dnsmasq_of_another_user_is_replaced(world: World) -> None:
    world.start(LAB)
    [before] = world.dnsmasqs()
    world.end()
    world.dnsmasq_uid += 1
    world.start()
    [after] = world.dnsmasqs()
    assert after != before
    assert Path(f"/proc/{after}").stat().st_uid == world.dnsmasq_uid
    assert works(world, *pair(world))


@pytest.mark.parametrize(
    "harm",
    [
        ["nft", "flush", "ruleset"],
        ["nft", "delete", "table", "bridge", "vmherd-lab0"],
        ["nft", "flush", "chain", "inet", "vmherd-lab0", "forward"],
        ["nft", "flush", "set", "bridge", "vmherd-lab0", "macs"],
        ["ip", "link", "del", "lab0"],
        ["ip", "link", "set", "lab0", "down"],
        ["ip", "addr", "flush", "dev", "lab0"],
    ],
    ids=" ".join,
)
def test_what_somebody_else_takes_away_is_put_back(world: World, harm: list[str]) -> None:
    world.start(LAB)
    web, db = pair(world)
    before = world.ruleset()
    world.host.run(*harm)
    eventually(lambda: world.ruleset() == before and "10.77.0.1/24" in world.host.ip("addr", "show", "up"))
    eventually(lambda: f"{db.device}:" in world.host.ip("link", "show", "master", "lab0"))
    eventually(lambda: len(world.dnsmasqs()) == 1 and (world.run / "lab0" / "own" / "pid").exists())
    assert works(world, web, db)


def test_other_tables_are_left_alone(world: World) -> None:
    world.start(LAB)
    world.host.run("nft", "add", "table", "inet", "mine")
    world.restart()
    world.launch("web", "10.77.0.2")
    assert "table inet mine" in world.tables()
    world.host.run("nft", "delete", "table", "inet", "mine")


def test_machines_come_while_somebody_takes_the_rules_away(world: World) -> None:
    world.start(LAB)
    guests = []
    for number in range(2, 8):
        world.host.run("nft", "flush", "ruleset")
        guests.append(world.launch(f"web{number}", f"10.77.0.{number}"))
    eventually(lambda: all(world.ruleset().count(f'"{guest.device}"') == 5 for guest in guests))


def test_helpers_killed_at_any_moment_leave_one_of_everything(world: World) -> None:
    world.networks = [dict(LAB)]
    for _ in range(6):
        world.spawn()
        assert world.peer is not None
        world.peer.sendall(b'["open", {"running": {}}]')
        eventually(lambda: world.run.exists() or world.links())
        world.end()
    world.start(LAB)
    web, db = pair(world)
    assert len(world.dnsmasqs()) == 1
    assert works(world, web, db)


def test_a_network_that_left_the_settings_goes_when_nobody_uses_it(world: World) -> None:
    world.start(LAB, {"name": "old", "bridge": "old0", "subnet": "10.78.0.0/24"})
    old = world.configured("old", "10.78.0.2", network="old")
    world.end()
    with pytest.raises(Refused, match=r"'old' runs with 10\.78\.0\.2"):
        world.start(LAB)
    assert "old0" in world.links()
    world.end()
    old.power_off()
    world.start(LAB)
    assert world.links() == ["lab0"]
    assert "old0" not in world.ruleset()
    assert len(world.dnsmasqs()) == 1


def test_a_changed_subnet_is_taken_over_when_nobody_uses_the_old_one(world: World) -> None:
    world.start(LAB)
    web = world.configured("web", "10.77.0.2")
    world.end()
    changed = LAB | {"subnet": "10.80.0.0/24"}
    with pytest.raises(Refused, match="settings changed"):
        world.start(changed)
    world.end()
    web.power_off()
    world.start(changed)
    assert "10.77.0.1" not in world.host.ip("addr") + world.ruleset()
    other = world.launch("other", "10.80.0.2")
    assert socket.inet_ntoa(dhcp(other.namespace, other.mac)[0]) == "10.80.0.2"


def test_a_teardown_leaves_nothing_and_refuses_while_machines_run(world: World) -> None:
    forwarding = world.forwarding()
    world.start(LAB)
    assert world.forwarding() == "1"
    web = world.configured("web", "10.77.0.2")
    with pytest.raises(Refused, match="another helper"):
        world.ask("teardown")
    world.end()
    world.spawn()
    with pytest.raises(Refused, match=web.device):
        world.ask("teardown")
    assert "lab0" in world.links()
    web.power_off()
    for _ in range(2):
        world.ask("teardown")
        assert (world.links(), world.tables(), world.dnsmasqs(), world.forwarding()) == ([], [], [], forwarding)
        assert not world.run.exists()
