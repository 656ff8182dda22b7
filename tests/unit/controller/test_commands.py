"""When commands are done that the agent does not answer, against a QEMU that tells events when the test wants."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.framework.fake_agent import FakeAgent, Held, Request
from tests.framework.fake_qmp import event
from tests.unit.controller.conftest import AGENT_OPENS, DEADLINE_S, ENDED, reached, with_agent
from vmherd.controller import commands
from vmherd.controller.agent_calls import to_vmherd_error
from vmherd.controller.supervisor import Supervisor
from vmherd.controller.world import World
from vmherd.guest_agent import AgentNotConnected, AgentUnresponsive, CommandDisabled, CommandFailed
from vmherd.model.errors import DeadlineExceeded
from vmherd.model.layout import InstanceRun
from vmherd.model.lifecycle import State
from vmherd.model.readiness import Rung

pytestmark = pytest.mark.anyio

RESET = event("RESET", guest=True, reason="guest-reset")
POWER_OFF = event("SHUTDOWN", guest=True, reason="guest-shutdown")
AGENT_LEAVES = event("VSERPORT_CHANGE", id="agent0", open=False)

COMPLETIONS = [
    ("guest-shutdown", {}, POWER_OFF),
    ("guest-shutdown", {"mode": "powerdown"}, POWER_OFF),
    ("guest-shutdown", {"mode": "reboot"}, RESET),
    ("guest-shutdown", {"mode": "halt"}, AGENT_LEAVES),
    ("guest-suspend-ram", {}, event("SUSPEND")),
    ("guest-suspend-hybrid", {}, event("SUSPEND")),
    ("guest-suspend-disk", {}, event("SUSPEND_DISK")),
    ("guest-suspend-disk", {}, POWER_OFF),
]


class Taken:
    """An agent that takes a command and does not answer it, as it should; `event` tells that it has it."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    async def __call__(self, _: Request) -> bytes:
        self.event.set()
        return b""


async def begin(
    supervisor: Supervisor, agent: FakeAgent, command: str, arguments: dict[str, Any], timeout_s: float = DEADLINE_S
) -> asyncio.Task[object]:
    """A command that the agent has taken."""
    agent.answers[command] = taken = Taken()
    executing = asyncio.create_task(commands.execute(supervisor, command, arguments, timeout_s=timeout_s))
    await taken.event.wait()
    return executing


@pytest.mark.parametrize(("command", "arguments", "completion"), COMPLETIONS)
async def test_it_is_done_when_qemu_says_so_and_no_earlier(
    world: World, run: InstanceRun, command: str, arguments: dict[str, Any], completion: dict[str, object]
) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        before = len(agent.asked())
        executing = await begin(supervisor, agent, command, arguments)
        assert await supervisor.open_agent().execute("guest-get-host-name", timeout_s=DEADLINE_S)
        assert not executing.done()
        qemu.say(completion)
        assert await executing == {}
        assert agent.asked()[before:].count(command) == 1


async def test_what_happened_before_completes_nothing(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        (await begin(supervisor, agent, "guest-shutdown", {"mode": "halt"})).cancel()
        qemu.say(event("SUSPEND"))
        await supervisor.until(lambda: supervisor.instance.state is State.SUSPENDED)
        qemu.say(event("WAKEUP"))
        qemu.say(AGENT_OPENS)
        await supervisor.until(lambda: reached(supervisor, Rung.AGENT))
        executing = await begin(supervisor, agent, "guest-suspend-ram", {})
        assert not executing.done()
        qemu.say(event("SUSPEND"))
        await executing


async def test_a_guest_that_took_it_and_does_nothing(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        executing = await begin(supervisor, agent, "guest-shutdown", {"mode": "reboot"}, timeout_s=1)
        with pytest.raises(AgentUnresponsive) as raised:
            await executing
    assert str(raised.value) == "guest-shutdown: the guest did not reset itself within 1 s; outcome unknown"
    told = to_vmherd_error(raised.value, "web")
    assert isinstance(told, DeadlineExceeded)
    assert told.metadata["outcome_unknown"] == "True"


async def test_a_guest_that_was_never_asked_is_known_not_to_go_down(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, _, agent):
        agent.answers["guest-get-host-name"] = held = Held()
        call = supervisor.open_agent().execute("guest-get-host-name", timeout_s=DEADLINE_S)
        busy = asyncio.create_task(call)
        await held.received.wait()
        with pytest.raises(AgentUnresponsive) as raised:
            await commands.execute(supervisor, "guest-shutdown", {}, timeout_s=0.5)
        held.release.set()
        await busy
        assert "guest-shutdown" not in agent.asked()
    assert not raised.value.outcome_unknown


async def test_an_agent_that_ends_before_its_guest_is_no_failure(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        executing = await begin(supervisor, agent, "guest-shutdown", {"mode": "reboot"})
        qemu.say(AGENT_LEAVES)
        await supervisor.until(lambda: not supervisor.instance.addresses)
        assert not executing.done()
        qemu.say(RESET)
        assert await executing == {}


async def test_a_guest_that_did_not_stay_suspended(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        executing = await begin(supervisor, agent, "guest-suspend-disk", {})
        qemu.say(AGENT_LEAVES)
        await supervisor.until(lambda: not reached(supervisor, Rung.AGENT))
        assert not executing.done()
        qemu.say(AGENT_OPENS)
        with pytest.raises(CommandFailed, match="its agent is back"):
            await executing


async def test_a_machine_that_ends_otherwise(world: World, run: InstanceRun) -> None:
    async with with_agent(world, run) as (supervisor, qemu, agent):
        executing = await begin(supervisor, agent, "guest-shutdown", {})
        qemu.say(event("SHUTDOWN", guest=True, reason="guest-panic"))
        qemu.hang_up()
        supervisor.process_seen(ENDED)
        with pytest.raises(AgentNotConnected, match="the machine has ended otherwise; outcome unknown"):
            await executing


async def test_what_the_agent_refuses_is_told_at_once(world: World, run: InstanceRun) -> None:
    async def fails(request: Request) -> bytes:
        return request.failure("GenericError", "the requested suspend mode is not supported by the guest")

    async with with_agent(world, run) as (supervisor, _, agent):
        agent.answers["guest-suspend-disk"] = fails
        agent.blocked = {"guest-shutdown"}
        with pytest.raises(CommandFailed, match="is not supported by the guest"):
            await commands.execute(supervisor, "guest-suspend-disk", {}, timeout_s=DEADLINE_S)
        with pytest.raises(CommandDisabled):
            await commands.execute(supervisor, "guest-shutdown", {}, timeout_s=DEADLINE_S)


async def test_a_mode_that_no_agent_knows_is_for_the_agent_to_refuse(world: World, run: InstanceRun) -> None:
    async def fails(request: Request) -> bytes:
        return request.failure("GenericError", f"mode {request.arguments['mode']}")

    async with with_agent(world, run) as (supervisor, _, agent):
        agent.answers["guest-shutdown"] = fails
        for mode in ("sleep", 5, None, ["halt"]):
            with pytest.raises(CommandFailed):
                await commands.execute(supervisor, "guest-shutdown", {"mode": mode}, timeout_s=DEADLINE_S)


def test_a_guest_that_goes_down_has_more_time_than_others() -> None:
    assert commands.timeout_default_s("guest-ping", 10) == 10
    assert commands.timeout_default_s("guest-shutdown", 10) == commands.timeout_default_s("guest-suspend-ram", 10) > 60
