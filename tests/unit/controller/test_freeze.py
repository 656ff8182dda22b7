"""A freeze ends in time, whatever becomes of the one who asked for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.framework.fake_agent import FakeAgent, Held, Request
from tests.framework.fake_qmp import FakeQmp, event
from tests.unit.controller.conftest import AGENT_OPENS, DEADLINE_S, ENDED, RUNNING, reached, supervising, with_agent
from vmherd.controller import commands, freeze
from vmherd.controller.records import decode_instance, instance_key
from vmherd.controller.store import StoreError
from vmherd.controller.supervisor import Supervisor
from vmherd.controller.world import World
from vmherd.guest_agent import AgentFrozen, AgentNotRunning, AgentUnresponsive, CommandFailed
from vmherd.model.errors import ResourceExhausted
from vmherd.model.instance import Instance, Operation, Verb, started
from vmherd.model.layout import InstanceRun
from vmherd.model.lifecycle import State
from vmherd.model.readiness import Rung

pytestmark = pytest.mark.anyio

FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
LONG_S = 600.0


async def execute(supervisor: Supervisor, command: str = FREEZE, thaw_after_s: float = LONG_S) -> object:
    return await commands.execute(supervisor, command, {}, timeout_s=DEADLINE_S, thaw_after_s=thaw_after_s)


async def fails(request: Request) -> bytes:
    return request.failure("GenericError", "failed to freeze /")


async def stored(world: World) -> Instance:
    entry = await world.store.get(instance_key("web"))
    assert entry is not None
    return decode_instance(entry.value)


async def thawed(supervisor: Supervisor) -> None:
    await supervisor.until(lambda: supervisor.instance.frozen_until_s is None)


@asynccontextmanager
async def frozen(world: World, run: InstanceRun) -> AsyncIterator[tuple[Supervisor, FakeQmp, FakeAgent]]:
    """A running machine whose file systems are frozen for long."""
    async with with_agent(world, run) as (supervisor, qemu, agent):
        assert await execute(supervisor) == 1
        yield supervisor, qemu, agent


async def test_a_freeze_is_shown_with_its_end_and_a_thaw_ends_it(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        before_s = time.time()
        assert await execute(supervisor) == 1
        assert agent.frozen
        frozen_until_s = supervisor.instance.frozen_until_s
        assert frozen_until_s is not None
        assert before_s + LONG_S <= frozen_until_s <= time.time() + LONG_S
        assert await execute(supervisor, THAW) == 1
        assert not agent.frozen
        assert (supervisor.instance.frozen_until_s, (await stored(world)).frozen_until_s) == (None, None)


@pytest.mark.parametrize("command", sorted(commands.FREEZES))
async def test_it_thaws_by_itself(world: World, run: InstanceRun, command: str) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        await execute(supervisor, command, thaw_after_s=0.05)
        await thawed(supervisor)
        assert not agent.frozen


async def test_the_end_is_stored_before_the_agent_is_asked(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        agent.answers[FREEZE] = held = Held()
        freezing = asyncio.create_task(execute(supervisor))
        await held.received.wait()
        assert (await stored(world)).frozen_until_s is not None
        held.release.set()
        await freezing


async def test_what_cannot_be_stored_is_not_frozen(
    world: World, run: InstanceRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> int:
        raise StoreError("database or disk is full")

    async with with_agent(world, run) as (supervisor, _, agent):
        with monkeypatch.context() as patch:
            patch.setattr(world.store, "transact", full)
            with pytest.raises(ResourceExhausted, match="nothing was frozen"):
                await execute(supervisor)
        assert supervisor.instance.frozen_until_s is None
        assert FREEZE not in agent.asked()


@pytest.mark.parametrize("late_s", [-0.1, 0.1], ids=["over", "to-come"])
async def test_the_next_controller_thaws(world: World, run: InstanceRun, late_s: float) -> None:
    left = replace(RUNNING, frozen_until_s=time.time() + late_s)
    async with (
        FakeQmp(run.qmp) as qemu,
        FakeAgent(run.agent, frozen=True) as agent,
        supervising(world, left) as supervisor,
    ):
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        qemu.say(AGENT_OPENS)
        await thawed(supervisor)
        assert not agent.frozen
        assert time.time() >= (left.frozen_until_s or 0)


async def test_a_clock_that_was_set_back_does_not_prolong_a_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeze, "THAW_AFTER_MAX_S", 0.0)
    assert freeze.left_s(time.time() + LONG_S) == 0.0


async def test_a_thaw_that_fails_is_tried_again(
    world: World, run: InstanceRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze, "RETRY_DELAYS_S", (0.01,))
    async with with_agent(world, run) as (supervisor, qemu, agent):
        agent.answers[THAW] = fails
        await execute(supervisor, thaw_after_s=0.01)
        qemu.say(event("VSERPORT_CHANGE", id="agent0", open=False))  # the agent is started anew, and still frozen
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        del agent.answers[THAW]
        assert agent.frozen
        qemu.say(AGENT_OPENS)
        await thawed(supervisor)
        assert not agent.frozen


async def test_a_second_freeze_is_refused_and_leaves_the_first_its_end(world: World, run: InstanceRun) -> None:
    async with frozen(world, run) as (supervisor, _, _agent):
        first = supervisor.instance.frozen_until_s
        with pytest.raises(AgentFrozen):
            await execute(supervisor, thaw_after_s=1.0)
        await execute(supervisor, "guest-fsfreeze-status")
        assert supervisor.instance.frozen_until_s == first


async def test_a_freeze_after_the_guest_has_thawed_by_itself_has_its_own_end(world: World, run: InstanceRun) -> None:
    async with frozen(world, run) as (supervisor, _, agent):
        first = supervisor.instance.frozen_until_s
        assert first is not None
        agent.frozen = False
        assert await execute(supervisor, thaw_after_s=2 * LONG_S) == 1
        await supervisor.until(lambda: (supervisor.instance.frozen_until_s or 0) >= first + LONG_S)


async def test_where_somebody_else_froze_nothing_is_thawed(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        agent.frozen = True
        with pytest.raises(AgentFrozen):
            await execute(supervisor)
        await thawed(supervisor)
        assert agent.frozen


async def test_where_nothing_can_be_frozen_nothing_is_to_thaw(world: World, run: InstanceRun) -> None:
    async def none(request: Request) -> bytes:
        return request.success(0)

    async with with_agent(world, run) as (supervisor, _, agent):
        agent.answers[FREEZE] = none
        assert await execute(supervisor) == 0
        await thawed(supervisor)
        assert THAW not in agent.asked()


async def test_a_freeze_that_failed_leaves_nothing_frozen(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        agent.answers[FREEZE] = fails
        with pytest.raises(CommandFailed):
            await execute(supervisor)
        await thawed(supervisor)
        assert agent.asked()[-1] == THAW


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "too-late"])
async def test_a_freeze_whose_caller_is_gone_is_thawed(world: World, run: InstanceRun, cancelled: bool) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        received = asyncio.Event()

        async def freezes_in_silence(_: Request) -> bytes:
            agent.frozen = True
            received.set()
            return b""

        agent.answers[FREEZE] = freezes_in_silence
        freezing = asyncio.create_task(commands.execute(supervisor, FREEZE, {}, timeout_s=1))
        await received.wait()
        if cancelled:
            freezing.cancel()
        with pytest.raises((AgentUnresponsive, asyncio.CancelledError)):
            await freezing
        await thawed(supervisor)
        assert not agent.frozen


async def test_a_thaw_waits_for_the_freeze_before_it(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        agent.answers[FREEZE] = held = Held()
        freezing = asyncio.create_task(execute(supervisor))
        await held.received.wait()
        with pytest.raises(AgentUnresponsive, match="an earlier freeze or thaw was not over"):
            await commands.execute(supervisor, THAW, {}, timeout_s=0.05)
        thawing = asyncio.create_task(execute(supervisor, THAW))
        held.release.set()
        await freezing
        await thawing
        await thawed(supervisor)


async def test_a_reset_and_the_end_leave_nothing_to_thaw(world: World, run: InstanceRun) -> None:
    async with frozen(world, run) as (supervisor, qemu, agent):
        qemu.say(event("RESET", guest=True, reason="guest-reset"))
        await thawed(supervisor)
        qemu.say(AGENT_OPENS)
        await supervisor.until(lambda: reached(supervisor, Rung.AGENT))
        agent.frozen = False
        await execute(supervisor)
        qemu.hang_up()
        supervisor.process_seen(ENDED)
        await thawed(supervisor)
        await supervisor.until(supervisor.ended.is_set)
        assert THAW not in agent.asked()


async def test_what_ends_while_it_is_paused_is_thawed_when_it_runs(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        qemu.say(event("STOP"))
        agent.answers[FREEZE] = held = Held()
        freezing = asyncio.create_task(execute(supervisor, thaw_after_s=0.01))
        await held.received.wait()
        await supervisor.until(lambda: supervisor.instance.state is State.PAUSED)
        held.release.set()
        await freezing
        assert THAW not in agent.asked()
        qemu.say(event("RESUME"))
        await thawed(supervisor)
        assert THAW in agent.asked()


async def test_a_stop_thaws_before_it_shuts_down(world: World, run: InstanceRun) -> None:
    async with frozen(world, run) as (supervisor, _, agent):
        gone = asyncio.Event()

        async def shuts_down(request: Request) -> bytes:
            if agent.frozen:
                return request.failure("CommandNotFound", "has been disabled: the agent is in frozen state")
            gone.set()
            return b""

        agent.answers["guest-shutdown"] = shuts_down
        stopping = asyncio.create_task(supervisor.submit(Operation("op", Verb.STOP)))
        await gone.wait()
        assert not agent.frozen
        supervisor.process_seen(ENDED)
        outcome = await stopping
        assert outcome.instance is not None
        assert (outcome.instance.state, outcome.instance.frozen_until_s) == (State.STOPPED, None)


async def test_addresses_are_asked_for_again_after_a_freeze(
    world: World, run: InstanceRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmherd.controller.probe.ADDRESS_DELAYS_S", (0.01,))
    async with frozen(world, run) as (supervisor, _, agent):
        asked = agent.asked().count("guest-network-get-interfaces")
        while agent.asked().count("guest-network-get-interfaces") < asked + 3:
            await execute(supervisor, "guest-ping")


async def test_an_agent_that_is_gone_freezes_nothing(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, _):
        qemu.say(event("VSERPORT_CHANGE", id="agent0", open=False))
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        with pytest.raises(AgentNotRunning):
            await execute(supervisor)
        await thawed(supervisor)


def test_a_start_begins_thawed() -> None:
    assert started(replace(RUNNING, frozen_until_s=5.0), 2.0).frozen_until_s is None
