"""Programs in a guest that is not to be trusted."""

from __future__ import annotations

import asyncio
import base64
from itertools import islice
from typing import Any

import pytest

from tests.framework.fake_agent import FakeAgent, Request, hang_up, never, value
from vmherd.guest_agent import (
    AgentNotConnected,
    AgentUnresponsive,
    CommandUnfinished,
    GuestAgent,
    ProtocolError,
    Stream,
    open_process,
    run,
)
from vmherd.guest_agent.programs import complete, pauses

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60
SHORT_S = 1.0
"""For what is never answered: what is takes milliseconds where nothing else runs."""


@pytest.mark.parametrize("argv", [[], "echo hello"])
async def test_run_takes_a_list_of_words(agent: GuestAgent, argv: Any) -> None:
    with pytest.raises(ValueError, match="list of at least one word"):
        await run(agent, argv, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(
    ("status", "complaint"),
    [
        ({}, "'exited' is missing"),
        ({"exited": 1}, "'exited' is an integer, not a boolean"),
        ({"exited": True, "exitcode": "0"}, "'exitcode' is a text, not an integer"),
        ({"exited": True, "out-data": 5}, "'out-data' is an integer, not a text"),
        ({"exited": True, "out-data": "a"}, "'out-data' is not base64"),
        ({"exited": True, "err-data": "$$$$"}, "'err-data' is not base64"),
        ({"exited": True, "err-data": "ä==="}, "'err-data' is not base64"),
        ([], "a list where an object belongs"),
    ],
)
async def test_run_checks_what_the_guest_says(
    agent: GuestAgent, fake: FakeAgent, status: object, complaint: str
) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = value(status)
    with pytest.raises(CommandUnfinished, match=complaint) as caught:
        await run(agent, ["true"], timeout_s=TIMEOUT_S)
    assert isinstance(caught.value.__cause__, ProtocolError)
    assert caught.value.pid == 42


@pytest.mark.parametrize("pid", [True, "42", None, 4.2])
async def test_run_checks_the_pid(agent: GuestAgent, fake: FakeAgent, pid: object) -> None:
    fake.answers["guest-exec"] = value({"pid": pid})
    with pytest.raises(ProtocolError, match="guest-exec: not the value it should be: 'pid'"):
        await run(agent, ["true"], timeout_s=TIMEOUT_S)


async def test_run_that_loses_contact(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = hang_up
    with pytest.raises(CommandUnfinished, match="process 42 was started and its end was not seen") as caught:
        await run(agent, ["sleep", "60"], timeout_s=TIMEOUT_S)
    assert isinstance(caught.value.__cause__, AgentNotConnected)
    assert caught.value.outcome_unknown


async def test_run_starts_a_program_once(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = never
    with pytest.raises(AgentUnresponsive, match="outcome unknown"):
        await run(agent, ["true"], timeout_s=SHORT_S)
    assert fake.asked() == ["guest-exec"]


def test_the_pauses_grow_up_to_a_limit() -> None:
    first = list(islice(pauses(), 100))
    assert first == sorted(first)
    assert first[0] < 0.005  # most programs end within milliseconds
    assert first[-1] == 0.25
    assert sum(first[:10]) < 0.25


async def test_run_of_a_program_that_does_not_end_when_told(
    agent: GuestAgent, fake: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmherd.guest_agent.process.END_TIMEOUT_S", SHORT_S)
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = value({"exited": False})
    with pytest.raises(
        CommandUnfinished, match="process 42 was started and it did not end when it was told to"
    ) as found:
        await run(agent, ["sleep", "60"], timeout_s=SHORT_S)
    assert found.value.pid == 42
    started = [request.arguments["path"] for request in fake.requests if request.command == "guest-exec"]
    assert started == ["sleep", "/bin/sh"]


async def test_a_lost_end_is_not_asked_for_again(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    async with open_process(agent, ["true"]) as process:
        fake.answers["guest-exec-status"] = value({"exited": True, "exitcode": 7, "out-data": "aGk="})
        assert [output.data async for output in process.output()] == [b"hi"]
        count = fake.asked().count("guest-exec-status")
        assert await process.has_ended()
        assert [output.data async for output in process.output({Stream.STDOUT: 1})] == [b"i"]
        assert fake.asked().count("guest-exec-status") == count
    assert process.result
    assert process.result.exit_code == 7


async def test_a_frozen_guest_keeps_a_program_waiting(agent: GuestAgent, fake: FakeAgent) -> None:
    async with open_process(agent, ["true"]) as process:
        fake.frozen = True
        assert not await process.has_ended()
        fake.frozen = False
        assert (await process.wait(timeout_s=TIMEOUT_S)).exit_code == 0


async def test_what_goes_wrong_beside_a_program_reaches_the_reader(agent: GuestAgent) -> None:
    async with open_process(agent, ["sleep", "60"]) as process:
        process.fail(OSError("the input broke"))
        with pytest.raises(OSError, match="the input broke"):
            await anext(process.output())
    assert process.result


async def test_run_sends_words_input_and_environment_as_they_are(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = value({"exited": True, "exitcode": 0})
    await run(agent, ["a b", "$c", "'"], input_data=b"\0\xff", env={"A": "b=c"}, timeout_s=TIMEOUT_S)
    (request,) = [request for request in fake.requests if request.command == "guest-exec"]
    assert request.arguments == {
        "path": "a b",
        "arg": ["$c", "'"],
        "env": ["A=b=c"],
        "input-data": base64.b64encode(b"\0\xff").decode(),
        "capture-output": True,
    }


def held_back(fake: FakeAgent) -> asyncio.Event:
    """Let the agent answer a ping only when this is set."""
    go = asyncio.Event()

    async def answer(request: Request) -> bytes:
        await go.wait()
        return request.success({})

    fake.answers["guest-ping"] = answer
    return go


async def test_a_program_is_ended_while_the_agent_is_busy_with_others(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = value({"exited": False})
    async with asyncio.timeout(TIMEOUT_S):
        async with open_process(agent, ["sleep", "60"]):
            go = held_back(fake)
            fake.requests.clear()
            others = [asyncio.create_task(agent.ping(timeout_s=TIMEOUT_S)) for _ in range(5)]
            while not fake.asked():  # noqa: ASYNC110  nothing tells
                await asyncio.sleep(0)
            fake.answers["guest-exec-status"] = value({"exited": True, "exitcode": 0})
            asyncio.get_running_loop().call_later(SHORT_S, go.set)
        await asyncio.gather(*others)
    # One was before it, and one had the next turn.
    assert fake.asked().index("guest-exec-status") <= 2
    assert fake.asked().count("guest-ping") == 5


async def test_the_last_question_after_a_program_outlives_its_time(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = value({"exited": True, "exitcode": 0})
    async with open_process(agent, ["true"]) as process:
        go = held_back(fake)
        other = asyncio.create_task(agent.ping(timeout_s=TIMEOUT_S))
        asyncio.get_running_loop().call_later(2 * SHORT_S, go.set)
        assert (await process.wait(timeout_s=SHORT_S / 2)).exit_code == 0
        await other


async def test_what_is_left_for_after_a_thaw_ends_with_the_agent(fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = value({"exited": False})
    before = asyncio.all_tasks()
    async with GuestAgent(fake.path) as agent:
        async with open_process(agent, ["sleep", "60"]):
            fake.frozen = True
        assert asyncio.all_tasks() - before
    fake.frozen = False
    assert [task for task in asyncio.all_tasks() - before if "_after_thaw" in repr(task)] == []


async def test_a_program_of_ours_that_does_not_end(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = value({"exited": False})
    with pytest.raises(CommandUnfinished, match=r"process 42 \(rm\) did not end within 1 s"):
        await complete(agent, ["rm"], timeout_s=SHORT_S)


async def test_a_program_of_ours_is_asked_for_when_its_caller_left(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    task = asyncio.create_task(complete(agent, ["rm"], timeout_s=TIMEOUT_S))
    async with asyncio.timeout(TIMEOUT_S):
        while "guest-exec" not in fake.asked():  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(0)
    fake.answers["guest-exec-status"] = value({"exited": True, "exitcode": 0})
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "guest-exec-status" in fake.asked()
