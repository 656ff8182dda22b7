"""Why a command is refused, from what the agent said of itself earlier in the same session."""

from __future__ import annotations

import asyncio

import pytest

from tests.framework.fake_agent import FakeAgent, Held
from vmherd.guest_agent import (
    AgentFrozen,
    AgentNotRunning,
    CommandDisabled,
    CommandNotFound,
    CommandUnavailable,
    GuestAgent,
)

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60


async def _refusal(agent: GuestAgent, command: str) -> type[CommandUnavailable]:
    with pytest.raises(CommandUnavailable) as caught:
        await agent.execute(command, timeout_s=TIMEOUT_S)
    return type(caught.value)


async def test_the_agent_is_asked_once_what_it_can_do(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.blocked = {"guest-get-time"}
    for _ in range(3):
        assert await _refusal(agent, "guest-make-coffee") is CommandNotFound
        assert await _refusal(agent, "guest-get-time") is CommandDisabled
    assert fake.asked().count("guest-info") == 1


async def test_what_info_told_is_used(agent: GuestAgent, fake: FakeAgent) -> None:
    await agent.info(timeout_s=TIMEOUT_S)
    assert await _refusal(agent, "guest-make-coffee") is CommandNotFound
    assert fake.asked() == ["guest-info", "guest-make-coffee"]
    await agent.info(timeout_s=TIMEOUT_S)
    assert fake.asked().count("guest-info") == 2


async def test_a_command_that_was_enabled_and_is_refused_is_looked_up_anew(agent: GuestAgent, fake: FakeAgent) -> None:
    await agent.info(timeout_s=TIMEOUT_S)
    fake.blocked = {"guest-get-time"}
    assert await _refusal(agent, "guest-get-time") is CommandDisabled
    assert await _refusal(agent, "guest-get-time") is CommandDisabled
    assert fake.asked().count("guest-info") == 2


async def test_a_command_that_was_disabled_is_still_sent(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.blocked = {"guest-get-timezone"}
    assert await _refusal(agent, "guest-get-timezone") is CommandDisabled
    fake.blocked = ()
    assert await agent.execute("guest-get-timezone", timeout_s=TIMEOUT_S) == {"zone": "UTC", "offset": 0}


async def test_frozen_or_not_is_never_remembered(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.blocked = {"guest-get-timezone"}
    for _ in range(2):
        fake.frozen = True
        assert await _refusal(agent, "guest-get-time") is AgentFrozen
        assert await _refusal(agent, "guest-make-coffee") is CommandNotFound
        fake.frozen = False
        assert await agent.execute("guest-get-time", timeout_s=TIMEOUT_S)
        assert await _refusal(agent, "guest-get-timezone") is CommandDisabled


async def test_another_session_is_asked_anew(agent: GuestAgent, fake: FakeAgent) -> None:
    assert await _refusal(agent, "guest-make-coffee") is CommandNotFound
    await fake.restart()
    assert await _refusal(agent, "guest-make-coffee") is CommandNotFound
    assert fake.asked().count("guest-info") == 2
    agent.set_port_open(False)
    agent.set_port_open(True)
    assert await _refusal(agent, "guest-make-coffee") is CommandNotFound
    assert fake.asked().count("guest-info") == 3


async def test_an_agent_that_refuses_to_say_what_it_can_do(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.blocked = {"guest-info"}
    assert await _refusal(agent, "guest-info") is CommandUnavailable
    assert await _refusal(agent, "guest-make-coffee") is CommandUnavailable


async def test_the_error_says_what_closed_the_port(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-get-time"] = Held()
    call = asyncio.create_task(agent.execute("guest-get-time", timeout_s=TIMEOUT_S))
    await held.received.wait()
    agent.set_port_open(False, "the guest was reset")
    agent.set_port_open(True)  # the guest is up again before the call has heard of it
    with pytest.raises(AgentNotRunning, match=r"^guest-get-time: the guest was reset; outcome unknown$") as caught:
        await call
    assert caught.value.outcome_unknown
    held.release.set()
    await agent.ping(timeout_s=TIMEOUT_S)
    agent.set_port_open(False, "the machine is off")
    with pytest.raises(AgentNotRunning, match=r"^guest-ping: the machine is off$"):
        await agent.ping(timeout_s=TIMEOUT_S)
