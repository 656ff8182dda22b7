"""Callers, deadlines and connections, with an agent that is slow or gone."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from tests.framework.fake_agent import FakeAgent, HangUp, Held, Request, hang_up, never
from vmherd.guest_agent import (
    AgentNotConfigured,
    AgentNotConnected,
    AgentNotRunning,
    AgentUnresponsive,
    GuestAgent,
)

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60
SHORT_S = 1.0
"""For what is never answered: what is takes milliseconds where nothing else runs."""


async def test_no_socket(path: Path) -> None:
    async with GuestAgent(path) as agent:
        with pytest.raises(AgentNotConfigured, match=str(path)) as caught:
            await agent.ping(timeout_s=TIMEOUT_S)
    assert caught.value.command == "guest-ping"
    assert not caught.value.outcome_unknown


async def test_nobody_listens_on_the_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as forgotten:
        forgotten.bind(str(path))
    async with GuestAgent(path) as agent:
        with pytest.raises(AgentNotConnected, match="refused"):
            await agent.ping(timeout_s=TIMEOUT_S)


async def test_a_path_too_long_for_a_socket() -> None:
    async with GuestAgent("/tmp/" + "x" * 200) as agent:
        with pytest.raises(AgentNotConnected, match="path too long"):
            await agent.ping(timeout_s=TIMEOUT_S)


async def test_the_queue_of_the_socket_is_full_until_others_leave(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(str(path))
        listener.listen(0)
        other.connect(str(path))
        async with GuestAgent(path) as agent:
            with pytest.raises(AgentUnresponsive, match="too many clients wait"):
                await agent.ping(timeout_s=SHORT_S)
            waiting = asyncio.create_task(agent.ping(timeout_s=TIMEOUT_S))
            await asyncio.sleep(0)
            listener.accept()[0].close()
            ours = await asyncio.to_thread(listener.accept)  # only comes because the client tries again
            ours[0].close()
            with pytest.raises(AgentNotConnected):
                await waiting


async def test_nothing_answers(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-sync-delimited"] = never
    with pytest.raises(AgentUnresponsive, match="no agent runs in the guest") as caught:
        await agent.execute("guest-exec", {"path": "true"}, timeout_s=SHORT_S)
    assert not caught.value.outcome_unknown
    assert "outcome unknown" not in str(caught.value)
    assert caught.value.elapsed_s >= SHORT_S
    assert fake.asked() == []


async def test_a_call_waits_for_an_agent_that_comes_late(agent: GuestAgent, fake: FakeAgent) -> None:
    boot = Held()

    async def sync(request: Request) -> bytes:
        await boot(request)
        return request.success(request.arguments["id"])

    fake.answers["guest-sync-delimited"] = sync
    call = asyncio.create_task(agent.ping(timeout_s=TIMEOUT_S))
    await boot.received.wait()
    boot.release.set()
    await call


async def test_a_port_that_the_guest_closed_fails_calls_at_once(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-get-time"] = Held()
    on_its_way = asyncio.create_task(agent.execute("guest-get-time", timeout_s=TIMEOUT_S))
    queued = asyncio.create_task(agent.execute("guest-get-osinfo", timeout_s=TIMEOUT_S))
    await held.received.wait()
    agent.set_port_open(False)
    with pytest.raises(AgentNotRunning, match="outcome unknown") as caught:
        await on_its_way
    assert caught.value.outcome_unknown
    with pytest.raises(AgentNotRunning) as caught:
        await queued
    assert not caught.value.outcome_unknown

    held.release.set()
    for port_open in (True, None):
        agent.set_port_open(port_open)
        await agent.ping(timeout_s=TIMEOUT_S)
    assert fake.asked() == ["guest-get-time", "guest-ping", "guest-ping"]


@pytest.mark.parametrize("turns", range(6))
async def test_a_port_that_closes_while_a_call_connects(agent: GuestAgent, fake: FakeAgent, turns: int) -> None:
    fake.answers["guest-sync-delimited"] = never
    call = asyncio.create_task(agent.ping(timeout_s=TIMEOUT_S))
    for _ in range(turns):
        await asyncio.sleep(0)
    agent.set_port_open(False)
    with pytest.raises(AgentNotRunning) as caught:
        await call
    assert caught.value.elapsed_s < TIMEOUT_S / 2


async def test_close_ends_calls_on_their_way_and_later_ones(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-get-time"] = Held()
    calls = [asyncio.create_task(agent.execute("guest-get-time", timeout_s=TIMEOUT_S)) for _ in range(2)]
    await held.received.wait()
    await agent.close()
    on_its_way, queued = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(on_its_way, AgentNotConnected)
    assert on_its_way.outcome_unknown
    assert isinstance(queued, AgentNotConnected)
    assert not queued.outcome_unknown
    with pytest.raises(AgentNotConnected, match="this client was closed"):
        await agent.ping(timeout_s=TIMEOUT_S)


async def test_a_late_reply_is_never_taken_for_anothers(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-get-time"] = Held()
    with pytest.raises(AgentUnresponsive, match="outcome unknown") as caught:
        await agent.execute("guest-get-time", timeout_s=SHORT_S)
    assert caught.value.outcome_unknown
    next_call = asyncio.create_task(agent.execute("guest-get-host-name", timeout_s=TIMEOUT_S))
    await fake.wait_for_clients(2)
    held.release.set()  # the late reply is the first thing that the new connection gets
    assert await next_call == {"host-name": socket.gethostname()}
    assert fake.asked() == ["guest-get-time", "guest-get-host-name"]


async def test_a_late_sync_is_never_taken_for_another_clients(agent: GuestAgent, fake: FakeAgent) -> None:
    held = Held()

    async def sync(request: Request) -> bytes:
        await held(request)
        return request.success(request.arguments["id"])

    fake.answers["guest-sync-delimited"] = sync
    async with GuestAgent(fake.path) as earlier:
        with pytest.raises(AgentUnresponsive):
            await earlier.ping(timeout_s=SHORT_S)
        call = asyncio.create_task(agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S))
        await fake.wait_for_clients(2)
        held.release.set()
        assert await call == 5


async def test_the_rest_of_a_reply_that_was_cut_off_is_void(agent: GuestAgent, fake: FakeAgent) -> None:
    rest = Held()

    async def in_two_parts(request: Request) -> bytes:
        reply = request.success("x" * 1000)
        await fake.send(reply[:500])
        await rest(request)
        return reply[500:]

    fake.answers["guest-get-time"] = in_two_parts
    with pytest.raises(AgentUnresponsive):
        await agent.execute("guest-get-time", timeout_s=SHORT_S)
    next_call = asyncio.create_task(agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S))
    await fake.wait_for_clients(2)
    rest.release.set()
    assert await next_call == 5


async def test_a_cancelled_call_leaves_the_channel_to_the_next(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-get-time"] = Held()
    call = asyncio.create_task(agent.execute("guest-get-time", timeout_s=TIMEOUT_S))
    await held.received.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    held.release.set()
    assert await agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S) == 5


async def test_the_deadline_covers_the_queue(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-get-time"] = Held()
    first = asyncio.create_task(agent.execute("guest-get-time", timeout_s=TIMEOUT_S))
    await held.received.wait()
    with pytest.raises(AgentUnresponsive, match="earlier calls were not finished") as caught:
        await agent.execute("guest-exec", {"path": "true"}, timeout_s=SHORT_S)
    assert not caught.value.outcome_unknown
    held.release.set()
    assert await first == "held"
    assert fake.asked() == ["guest-get-time"]


@pytest.mark.parametrize("timeout_s", [0, -1])
async def test_a_deadline_in_the_past_sends_nothing(agent: GuestAgent, fake: FakeAgent, timeout_s: float) -> None:
    await agent.ping(timeout_s=TIMEOUT_S)
    with pytest.raises(AgentUnresponsive) as caught:
        await agent.execute("guest-exec", {"path": "true"}, timeout_s=timeout_s)
    assert not caught.value.outcome_unknown
    await agent.ping(timeout_s=TIMEOUT_S)
    assert fake.asked() == ["guest-ping", "guest-ping"]


async def test_callers_come_in_their_order_past_a_cancelled_one(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-get-time"] = Held()
    first = asyncio.create_task(agent.execute("guest-get-time", timeout_s=TIMEOUT_S))
    await held.received.wait()
    callers = [
        asyncio.create_task(agent.execute("guest-sync", {"id": number}, timeout_s=TIMEOUT_S)) for number in range(6)
    ]
    await asyncio.sleep(0)  # all stand in the queue
    callers[0].cancel()
    callers[3].cancel()
    held.release.set()
    await asyncio.gather(first, *callers, return_exceptions=True)
    order = [request.arguments["id"] for request in fake.requests if request.command == "guest-sync"]
    assert order == [1, 2, 4, 5]


@pytest.mark.parametrize("half", [b"", b'{"return": {"host-na', b'{"id": '])
async def test_a_connection_lost_in_the_middle(agent: GuestAgent, fake: FakeAgent, half: bytes) -> None:
    async def half_a_line(_: Request) -> bytes:
        raise HangUp(half)

    fake.answers["guest-get-host-name"] = half_a_line
    with pytest.raises(AgentNotConnected, match="closed; outcome unknown") as caught:
        await agent.execute("guest-get-host-name", timeout_s=TIMEOUT_S)
    assert caught.value.outcome_unknown
    await agent.ping(timeout_s=TIMEOUT_S)
    assert fake.asked() == ["guest-get-host-name", "guest-ping"]  # not repeated


async def test_a_connection_lost_before_the_agent_answered(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-sync-delimited"] = hang_up
    with pytest.raises(AgentNotConnected) as caught:
        await agent.ping(timeout_s=TIMEOUT_S)
    assert not caught.value.outcome_unknown


async def test_a_connection_lost_between_calls_is_made_again(agent: GuestAgent, fake: FakeAgent) -> None:
    for _ in range(3):
        await agent.ping(timeout_s=TIMEOUT_S)
        await fake.restart()
    await agent.ping(timeout_s=TIMEOUT_S)


async def test_one_sync_serves_a_whole_connection(agent: GuestAgent, fake: FakeAgent) -> None:
    for _ in range(10):
        await agent.ping(timeout_s=TIMEOUT_S)
    assert [request.command for request in fake.requests] == ["guest-sync-delimited"] + ["guest-ping"] * 10
