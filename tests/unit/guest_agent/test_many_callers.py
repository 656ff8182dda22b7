"""Two hundred callers on one agent."""

from __future__ import annotations

import asyncio

import pytest

from tests.framework.fake_agent import FakeAgent, Held
from vmherd.guest_agent import GuestAgent, run

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60
CALLERS = 200


async def test_each_caller_gets_its_own_answer(agent: GuestAgent, fake: FakeAgent) -> None:
    async def ask(number: int) -> object:
        if number % 40 == 0:
            result = await run(agent, ["/bin/echo", str(number)], timeout_s=TIMEOUT_S)
            return int(result.stdout)
        return await agent.execute("guest-sync", {"id": number}, timeout_s=TIMEOUT_S)

    assert await asyncio.gather(*map(ask, range(CALLERS))) == list(range(CALLERS))


async def test_a_ping_waits_for_one_command_and_not_for_a_program(agent: GuestAgent, fake: FakeAgent) -> None:
    program = asyncio.create_task(run(agent, ["/bin/sh", "-c", "read line"], timeout_s=TIMEOUT_S))
    held = fake.answers["guest-exec-status"] = Held()
    await held.received.wait()
    ping = asyncio.create_task(agent.ping(timeout_s=TIMEOUT_S))
    await asyncio.sleep(0)  # it stands in the queue
    del fake.answers["guest-exec-status"]
    before = len(fake.asked())
    held.release.set()
    await ping
    assert fake.asked()[before] == "guest-ping"
    program.cancel()
    await asyncio.gather(program, return_exceptions=True)


async def test_callers_that_come_all_the_time_keep_nobody_waiting(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-get-time"] = Held()
    first = asyncio.create_task(agent.execute("guest-get-time", timeout_s=TIMEOUT_S))
    await held.received.wait()

    async def call_twice(number: int) -> None:
        for turn in range(2):
            await agent.execute("guest-sync", {"id": turn * CALLERS + number}, timeout_s=TIMEOUT_S)

    callers = [asyncio.create_task(call_twice(number)) for number in range(CALLERS)]
    await asyncio.sleep(0)  # all stand in the queue
    held.release.set()
    await asyncio.gather(first, *callers)
    order = [request.arguments["id"] for request in fake.requests if request.command == "guest-sync"]
    assert order == list(range(2 * CALLERS))
