"""What a herd makes of what users ask for, with a helper that starts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.framework.fake_helper import FakeHelper, fake_helper
from tests.unit.controller.conftest import herd_in, world_in
from vmherd.api.qemu.v1 import qemu_pb2
from vmherd.controller.herd import Herd
from vmherd.controller.records import decode_instance, instance_key
from vmherd.controller.store import Put, SqliteStore
from vmherd.controller.views import Snapshot
from vmherd.model.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    VmherdError,
)
from vmherd.model.instance import LaunchSpec, NetworkInterface, Verb
from vmherd.model.lifecycle import State
from vmherd.model.network import Network

pytestmark = pytest.mark.anyio
LAB = qemu_pb2.Network(name="lab", bridge="vmbr0", subnet="10.20.0.0/29", ipv6_subnet="fd00:20::/64", isolated=True)

Open = Callable[[], AbstractAsyncContextManager[Herd]]


@pytest.fixture
async def helper(directory: Path) -> AsyncIterator[FakeHelper]:
    """A helper with one network of five addresses."""
    fake = FakeHelper()
    fake.networks = [LAB]
    async with fake_helper(directory / "qemu.sock", fake):
        yield fake


@pytest.fixture
def open_herd(directory: Path, kept_loop: None) -> Open:
    """Opens the one herd that there is, as each start of a controller does."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Herd]:
        async with world_in(directory, directory / "qemu.sock") as world, herd_in(world) as herd:
            await world.helper.wait_connected()
            yield herd

    return opened


def stopped(name: str, *nics: NetworkInterface, request_id: str = "") -> LaunchSpec:
    return LaunchSpec(name, image="idle", start=False, nics=nics, request_id=request_id)


async def test_a_record_that_is_none_is_named_and_left_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.sqlite")
    await store.transact([Put(instance_key("web"), b'{"name": 1}')])
    with pytest.raises(FailedPrecondition, match="instances/web cannot be read") as raised:
        await Herd(Mock(store=store)).open()
    assert raised.value.reason == "RECORD_NOT_READABLE"
    entry = await store.get(instance_key("web"))
    assert entry
    assert entry.value == b'{"name": 1}'
    await store.close()


@pytest.mark.usefixtures("helper")
async def test_launches_at_once_get_an_address_each_until_there_is_none(open_herd: Open) -> None:
    async with open_herd() as herd:
        launches = (herd.launch(stopped(f"vm{number}"), f"print{number}") for number in range(8))
        answers = await asyncio.gather(*launches, return_exceptions=True)
        launched = [answer.instance for answer in answers if isinstance(answer, Snapshot)]
        assert {nic.ipv4_address for each in launched for nic in each.nics} == {f"10.20.0.{n}" for n in range(2, 7)}
        full = [answer for answer in answers if not isinstance(answer, Snapshot)]
        assert [type(error) for error in full] == [ResourceExhausted] * 3
        assert {supervisor.instance.name for supervisor in herd.supervisors} == {each.name for each in launched}

        # A stopped one keeps its address, and a deleted one gives it back.
        first = launched[0]
        await herd.command(Verb.DELETE, first.name, "delete")
        again = await herd.launch(stopped("again"), "again")
        assert again.instance.nics[0].ipv4_address == first.nics[0].ipv4_address
        assert again.instance.nics[0].mac != first.nics[0].mac


@pytest.mark.usefixtures("helper")
async def test_an_address_of_ones_own_is_ones_own_also_for_equal_requests_at_once(open_herd: Open) -> None:
    nic = NetworkInterface("lab", "52:00:00:00:00:01", "10.20.0.5")
    async with open_herd() as herd:
        same = [herd.launch(stopped("web", nic, request_id="r1"), "print") for _ in range(4)]
        answers = await asyncio.gather(*same)
        assert len({answer.instance.uid for answer in answers}) == 1
        for name, error in (("web", AlreadyExists), ("db", InvalidArgument)):
            with pytest.raises(error):
                await herd.launch(stopped(name, nic), "other")
    async with open_herd() as herd:  # the next controller knows as well
        with pytest.raises(InvalidArgument, match=r"nics\[0\]\.ipv4_address: 10\.20\.0\.5 is that of 'web'"):
            await herd.launch(stopped("db", NetworkInterface(ipv4_address="10.20.0.5")), "print")
        [web] = herd.supervisors
        assert web.instance == answers[0].instance


@pytest.mark.usefixtures("helper")
async def test_a_plan_shows_what_would_be_made_and_takes_no_address(open_herd: Open) -> None:
    async with open_herd() as herd:
        for _ in range(8):
            plan = await herd.plan(stopped("web", NetworkInterface(), NetworkInterface("user")))
        bridged, user = plan.instance.nics
        assert (bridged.network, bridged.ipv4_address, user.network) == ("lab", "10.20.0.2", "user")
        assert plan.machine.argv == ("qemu", "web")
        assert plan.machine.devices == ("a TAP device on lab",)
        assert plan.machine.rules == (f"ether saddr {bridged.mac}",)
        assert herd.supervisors == []


@pytest.mark.usefixtures("helper")
async def test_the_networks_are_the_helpers(open_herd: Open) -> None:
    async with open_herd() as herd:
        [network] = await herd.networks()
        assert isinstance(network, Network)
        assert (network.name, str(network.gateway), network.isolated) == ("lab", "10.20.0.1", True)


async def test_a_network_that_is_gone_fails_the_start_and_keeps_the_instance(
    helper: FakeHelper, open_herd: Open
) -> None:
    async with open_herd() as herd:
        await herd.launch(stopped("web"), "print")
    helper.networks = []
    helper.refusal = FailedPrecondition("nics[0].network: no network of the host is called 'lab'")
    async with open_herd() as herd:
        with pytest.raises(VmherdError, match=r"'web' did not start: .*no network of the host is called 'lab'"):
            await herd.command(Verb.START, "web", "print")
        [web] = herd.supervisors
        assert web.instance.state is State.FAILED
        assert web.instance.nics[0].ipv4_address == "10.20.0.2"
        [asked] = helper.started
        assert (asked.nics[0].network, asked.nics[0].ipv4_address) == ("lab", "10.20.0.2")
        assert asked.nics[0].backend == qemu_pb2.Nic.BRIDGE


@pytest.mark.usefixtures("helper")
async def test_an_update_changes_what_it_names_and_is_kept(open_herd: Open) -> None:
    async with open_herd() as herd:
        before = await herd.launch(stopped("web"), "print")
        assert await herd.update("web") == before
        changed = await herd.update("web", wants_autostart=True)
        assert changed.instance.autostart
        assert changed.revision > before.revision
        assert await herd.update("web", wants_autostart=True) == changed
        with pytest.raises(NotFound):
            await herd.update("db", wants_autostart=True)
    async with open_herd() as herd:
        assert herd.find("web").instance.autostart
        assert not (await herd.update("web", wants_autostart=False)).instance.autostart
        entry = await herd.find("web").world.store.get(instance_key("web"))
        assert entry
        assert not decode_instance(entry.value).autostart


@pytest.mark.usefixtures("kept_loop")
async def test_without_a_helper_nobody_knows_the_networks(directory: Path) -> None:
    async with world_in(directory, directory / "nobody.sock") as world:
        herd = Herd(world)
        with pytest.raises(Unavailable, match="the helper cannot be reached"):
            await herd.networks()
