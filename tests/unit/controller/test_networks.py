"""What an instance shows of its networks while it runs: addresses with those who tell them, and bound ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.framework.fake_agent import FakeAgent, value
from tests.framework.fake_helper import FakeHelper, fake_helper
from tests.framework.fake_qmp import FakeQmp, event
from tests.unit.controller.conftest import AGENT_OPENS, DEADLINE_S, ENDED, RUNNING, UID, reached, supervising, world_in
from vmherd.api.qemu.v1 import qemu_pb2
from vmherd.controller import host_probe, views
from vmherd.controller.tasks import cancelled
from vmherd.controller.world import World
from vmherd.model.errors import DeadlineExceeded, FailedPrecondition
from vmherd.model.instance import Address, NetworkInterface, Source
from vmherd.model.layout import InstanceRun
from vmherd.model.machine import PortForward, Protocol, mac_of
from vmherd.model.readiness import Rung

pytestmark = pytest.mark.anyio
MAC = mac_of(UID)
BRIDGED = replace(RUNNING, nics=(NetworkInterface("lab", MAC, "10.20.0.2"),))
FORWARDING = replace(RUNNING, nics=(NetworkInterface("user", MAC, forwards=(PortForward(Protocol.TCP, 22),)),))
LEASE = qemu_pb2.Address(address="10.20.0.2", prefix_length=24, mac=MAC, source=qemu_pb2.Address.LEASE)
NEIGHBOUR = qemu_pb2.Address(address="10.20.0.2", prefix_length=24, mac=MAC, source=qemu_pb2.Address.NEIGHBOUR)
LEASED = Address("10.20.0.2", 24, MAC, source=Source.LEASE)
INTERFACES = [
    {"name": "eth0", "hardware-address": MAC, "ip-addresses": [{"ip-address": "10.20.0.2", "prefix": 24}]},
]
USERNET = (
    "Hub -1 (net0):\r\n"
    "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    "  TCP[HOST_FORWARD]  11       127.0.0.1 32999       10.0.2.15    22     0     0\r\n"
)


@pytest.fixture
async def helper(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeHelper]:
    monkeypatch.setattr(host_probe, "DELAYS_S", (0.01,))
    monkeypatch.setattr(host_probe, "REFRESH_S", 0.01)
    async with fake_helper(directory / "qemu.sock", FakeHelper()) as fake:
        yield fake


@pytest.fixture
async def world(directory: Path, helper: FakeHelper, kept_loop: None) -> AsyncIterator[World]:
    async with world_in(directory, directory / "qemu.sock") as world:
        following = asyncio.create_task(world.helper.follow(Mock()))
        yield world
        await cancelled(following)


async def test_a_guest_without_an_agent_has_an_address_all_the_same(
    world: World, run: InstanceRun, helper: FakeHelper
) -> None:
    async with supervising(world, BRIDGED) as supervisor, FakeQmp(run.qmp):
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        told = []
        async for progress in views.wait(supervisor, Rung.ADDRESS, DEADLINE_S):
            told.append(progress)
            helper.addresses = [NEIGHBOUR, LEASE]
        first, *_, last = told
        assert first.waiting_for.startswith("an address on the guest's network interface")
        assert last.waiting_for == ""
        assert last.snapshot.instance.addresses == (LEASED,)
        assert reached(supervisor, Rung.QMP)
        with pytest.raises(DeadlineExceeded, match="the guest agent"):
            _ = [each async for each in views.wait(supervisor, Rung.AGENT, 0.05)]


async def test_the_agents_word_is_shown_as_long_as_there_is_an_agent(
    world: World, run: InstanceRun, helper: FakeHelper
) -> None:
    helper.addresses = [LEASE]
    agents = Address("10.20.0.2", 24, MAC, "eth0", Source.AGENT)
    async with supervising(world, BRIDGED) as supervisor, FakeQmp(run.qmp) as qemu, FakeAgent(run.agent) as agent:
        agent.answers["guest-network-get-interfaces"] = value(INTERFACES)
        await supervisor.until(lambda: supervisor.instance.addresses == (LEASED,))
        found = supervisor.instance.readiness.steps[-1]
        qemu.say(AGENT_OPENS)
        await supervisor.until(lambda: supervisor.instance.addresses == (agents,))
        assert reached(supervisor, Rung.ADDRESS)
        assert supervisor.instance.readiness.steps[-1] == found
        qemu.say(event("VSERPORT_CHANGE", id="agent0", open=False))
        await supervisor.until(lambda: supervisor.instance.addresses == (LEASED,))
        assert reached(supervisor, Rung.QMP)
        helper.addresses = []
        await supervisor.until(lambda: supervisor.instance.addresses == ())
        assert not supervisor.instance.readiness.has(Rung.ADDRESS)


async def test_a_helper_that_does_not_tell_is_asked_again(world: World, run: InstanceRun, helper: FakeHelper) -> None:
    helper.refusal = FailedPrecondition("the kernel does not say")
    helper.addresses = [LEASE]
    async with supervising(world, BRIDGED) as supervisor, FakeQmp(run.qmp):
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        for _ in range(2):
            await helper.asked_for_addresses.acquire()
        assert supervisor.instance.addresses == ()
        helper.refusal = None
        await supervisor.until(lambda: supervisor.instance.addresses == (LEASED,))


async def test_a_machine_that_has_ended_has_no_address(world: World, run: InstanceRun, helper: FakeHelper) -> None:
    helper.addresses = [LEASE]
    async with supervising(world, BRIDGED) as supervisor, FakeQmp(run.qmp) as qemu:
        await supervisor.until(lambda: supervisor.instance.readiness.has(Rung.ADDRESS))
        qemu.hang_up()
        supervisor.process_seen(ENDED)
        await supervisor.until(supervisor.ended.is_set)
        await supervisor.until(lambda: not supervisor.instance.addresses)
        assert supervisor.instance.nics[0].ipv4_address == "10.20.0.2"
        await supervisor.set_autostart(True)  # behind everything that was told before
        assert supervisor.instance.addresses == ()


async def test_who_is_on_no_network_of_the_host_is_not_asked_for(
    world: World, run: InstanceRun, helper: FakeHelper
) -> None:
    async with supervising(world, FORWARDING) as supervisor, FakeQmp(run.qmp) as qemu, FakeAgent(run.agent):
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        qemu.say(AGENT_OPENS)
        await supervisor.until(lambda: reached(supervisor, Rung.AGENT))
        assert helper.asked_for_addresses.locked()


async def test_who_has_no_network_interface_is_not_waited_for(world: World, run: InstanceRun) -> None:
    async with supervising(world, replace(RUNNING, nics=())) as supervisor, FakeQmp(run.qmp):
        with pytest.raises(FailedPrecondition, match="'web' has no network interface") as refused:
            _ = [each async for each in views.wait(supervisor, Rung.ADDRESS, DEADLINE_S)]
        assert refused.value.reason == "NO_NETWORK_INTERFACE"


async def test_a_bound_port_is_shown_while_qemu_runs_and_found_by_the_next_controller(
    world: World, run: InstanceRun
) -> None:
    async with FakeQmp(run.qmp, {"human-monitor-command": USERNET}) as qemu:
        async with supervising(world, FORWARDING) as supervisor:
            await supervisor.until(lambda: reached(supervisor, Rung.QMP))
            found = supervisor.instance
            assert found.nics[0].bound_ports == (32999,)
        # Who knows them does not ask: a guest with very many connections makes the answer long.
        qemu.asked.clear()
        async with supervising(world, replace(found, readiness=RUNNING.readiness)) as supervisor:
            await supervisor.until(lambda: reached(supervisor, Rung.QMP))
            assert supervisor.instance.nics[0].bound_ports == (32999,)
            assert "human-monitor-command" not in qemu.asked
        async with supervising(world, FORWARDING) as supervisor:
            await supervisor.until(lambda: reached(supervisor, Rung.QMP))
            qemu.hang_up()
            supervisor.process_seen(ENDED)
            await supervisor.until(lambda: not supervisor.instance.nics[0].bound_ports)
            assert supervisor.instance.nics == FORWARDING.nics


async def test_a_port_that_qemu_does_not_tell_stays_unknown(world: World, run: InstanceRun) -> None:
    async with supervising(world, FORWARDING) as supervisor, FakeQmp(run.qmp, {"human-monitor-command": "?"}):
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        assert supervisor.instance.nics[0].bound_ports == ()
