"""What one supervisor makes of what it is told, in whatever order that comes; without a helper that would answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.framework.fake_agent import FakeAgent, Held
from tests.framework.fake_qmp import FakeQmp, event
from tests.unit.controller.conftest import (
    AGENT_OPENS,
    ALIVE,
    DEADLINE_S,
    ENDED,
    RUNNING,
    STARTING,
    reached,
    supervising,
    with_agent,
)
from vmherd.controller.records import decode_instance, instance_key
from vmherd.controller.world import World
from vmherd.guest_agent import AgentNotRunning
from vmherd.model.errors import FailedPrecondition
from vmherd.model.instance import Cause, Exit
from vmherd.model.layout import InstanceRun
from vmherd.model.lifecycle import State
from vmherd.model.readiness import Rung

pytestmark = pytest.mark.anyio


async def test_the_control_socket_is_the_helpers_until_it_has_answered_the_start(
    world: World, run: InstanceRun
) -> None:
    async with supervising(world, STARTING) as supervisor, FakeQmp(run.qmp) as qemu:
        supervisor.process_seen(ALIVE)
        await supervisor.until(lambda: reached(supervisor, Rung.PROCESS))
        assert not qemu.connected.is_set()
        supervisor.process_started(ALIVE)
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        assert supervisor.instance.state is State.RUNNING


async def test_why_qemu_ended_is_known_also_when_its_end_is_told_first(world: World, run: InstanceRun) -> None:
    async with supervising(world, RUNNING) as supervisor, FakeQmp(run.qmp) as qemu:
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        supervisor.process_seen(ENDED)
        qemu.say(event("SHUTDOWN", guest=True, reason="guest-panic"))
        qemu.hang_up()
        await supervisor.until(supervisor.ended.is_set)
        await supervisor.until(lambda: supervisor.instance.state is State.FAILED)
        assert supervisor.instance.last_exit is not None
        assert supervisor.instance.last_exit.cause is Cause.GUEST_PANIC


async def test_a_machine_that_the_helper_does_not_know_is_gone_unless_it_answers(
    world: World, run: InstanceRun
) -> None:
    async with supervising(world, RUNNING) as supervisor:
        async with FakeQmp(run.qmp):
            await supervisor.until(lambda: reached(supervisor, Rung.QMP))
            supervisor.process_not_seen()
            await supervisor.changed.wait()
            assert supervisor.instance.state is State.RUNNING
        await supervisor.monitor.hung_up()
        supervisor.process_not_seen()
        await supervisor.until(lambda: supervisor.instance.state is State.FAILED)
        assert supervisor.instance.last_exit is not None
        assert supervisor.instance.last_exit.cause is Cause.VANISHED


async def test_a_machine_that_is_being_started_need_not_be_known_yet(world: World) -> None:
    stepped_on = replace(STARTING, readiness=RUNNING.readiness.climb(Rung.PROCESS, now_s=2.0, accepted_at_s=1.0))
    for instance in (STARTING, stepped_on):
        async with supervising(world, instance) as supervisor:
            supervisor.process_not_seen()
            await supervisor.changed.wait()
            assert supervisor.instance.state is State.STARTING


async def test_an_agents_port_that_opens_while_open_was_closed_in_between(world: World, run: InstanceRun) -> None:
    async with supervising(world, RUNNING) as supervisor, FakeQmp(run.qmp) as qemu, FakeAgent(run.agent) as agent:
        await supervisor.until(lambda: reached(supervisor, Rung.QMP))
        for _ in range(2):
            clients, changed = agent.clients, supervisor.changed
            qemu.say(AGENT_OPENS)
            await changed.wait()
            await supervisor.until(lambda: reached(supervisor, Rung.AGENT))
            assert agent.clients == clients + 1


async def test_a_command_that_is_under_way_and_an_update_leave_each_other_alone(world: World) -> None:
    async with supervising(world, STARTING) as supervisor:
        await supervisor.set_autostart(True)
        assert supervisor.instance == replace(STARTING, autostart=True)
        await supervisor.start_failed(Exit(Cause.START_FAILED, "not today", 2.0))
        assert supervisor.instance.autostart
        entry = await world.store.get(instance_key("web"))
        assert entry
        assert decode_instance(entry.value) == supervisor.instance


async def test_lost_and_found(world: World, run: InstanceRun) -> None:
    async with supervising(world, RUNNING) as supervisor:
        supervisor.helper_lost()
        world.helper.lost = True
        await supervisor.until(lambda: supervisor.instance.state is State.UNKNOWN)
        supervisor.process_seen(ALIVE)
        await supervisor.until(lambda: supervisor.instance.state is State.RUNNING)


async def test_news_of_another_start_are_no_news(world: World) -> None:
    async with supervising(world, RUNNING) as supervisor:
        before = supervisor.instance
        for generation in (0, 2):
            changed = supervisor.changed
            supervisor.process_seen(replace(ENDED, generation=generation))
            await changed.wait()
        assert supervisor.instance == before


async def test_a_guest_that_sleeps_is_shown_and_asked_nothing_until_it_wakes(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, _):
        qemu.say(event("SUSPEND"))
        await supervisor.until(lambda: supervisor.instance.state is State.SUSPENDED)
        assert reached(supervisor, Rung.QMP)
        with pytest.raises(FailedPrecondition, match="it is SUSPENDED; its agent can be asked when it is RUNNING"):
            supervisor.open_agent()
        with pytest.raises(FailedPrecondition, match="cannot pause 'web': it is SUSPENDED"):
            await supervisor.pause()
        qemu.events["system_wakeup"] = event("WAKEUP")
        await supervisor.resume()
        assert supervisor.instance.state is State.RUNNING
        assert qemu.asked[-1] == "system_wakeup"
        qemu.say(AGENT_OPENS)
        await supervisor.until(lambda: reached(supervisor, Rung.AGENT))


async def test_a_new_controller_finds_a_guest_that_sleeps(world: World, run: InstanceRun) -> None:
    suspended = {"query-status": {"running": False, "status": "suspended"}}
    async with supervising(world, RUNNING) as supervisor, FakeQmp(run.qmp, suspended):
        await supervisor.until(lambda: supervisor.instance.state is State.SUSPENDED)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (event("RESET", guest=True, reason="guest-reset"), "the guest was reset"),
        (event("SUSPEND"), "the guest has suspended itself to memory"),
        (event("VSERPORT_CHANGE", id="agent0", open=False), "its agent has left"),
    ],
    ids=["reset", "suspend", "agent-left"],
)
async def test_a_call_ends_with_what_ended_it(
    world: World, run: InstanceRun, what: dict[str, object], why: str
) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        agent.answers["guest-get-time"] = held = Held()
        calling = asyncio.create_task(supervisor.open_agent().execute("guest-get-time", timeout_s=DEADLINE_S))
        await held.received.wait()
        qemu.say(what)
        with pytest.raises(AgentNotRunning, match=f"{why}.*; outcome unknown"):
            await calling


async def test_a_call_ends_with_its_machine(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        agent.answers["guest-get-time"] = held = Held()
        calling = asyncio.create_task(supervisor.open_agent().execute("guest-get-time", timeout_s=DEADLINE_S))
        await held.received.wait()
        qemu.hang_up()
        supervisor.process_seen(ENDED)
        with pytest.raises(AgentNotRunning, match=r"its machine has ended: .*; outcome unknown"):
            await calling


async def test_a_call_outlasts_a_pause(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        agent.answers["guest-get-time"] = held = Held()
        calling = asyncio.create_task(supervisor.open_agent().execute("guest-get-time", timeout_s=DEADLINE_S))
        await held.received.wait()
        qemu.say(event("STOP"))
        await supervisor.until(lambda: supervisor.instance.state is State.PAUSED)
        with pytest.raises(FailedPrecondition, match="it is PAUSED"):
            supervisor.open_agent()
        qemu.say(event("RESUME"))
        await supervisor.until(lambda: supervisor.instance.state is State.RUNNING)
        held.release.set()
        assert await calling == "held"
