"""Programs in a guest that is not to be trusted."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.framework.fake_agent import FakeAgent, hang_up, never, value
from vmherd.guest_agent import (
    AgentNotConnected,
    AgentUnresponsive,
    CommandUnfinished,
    GuestAgent,
    ProtocolError,
    run,
)

pytestmark = pytest.mark.anyio

TIMEOUT_S = 10
SHORT_S = 0.2


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
    with pytest.raises(CommandUnfinished, match="sleep was started as process 42 and its end was not seen") as caught:
        await run(agent, ["sleep", "60"], timeout_s=TIMEOUT_S)
    assert isinstance(caught.value.__cause__, AgentNotConnected)
    assert caught.value.outcome_unknown


async def test_run_starts_a_program_once(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = never
    with pytest.raises(AgentUnresponsive, match="outcome unknown"):
        await run(agent, ["true"], timeout_s=SHORT_S)
    assert fake.asked() == ["guest-exec"]


async def test_run_asks_less_often_as_time_goes_on(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = value({"pid": 42})
    fake.answers["guest-exec-status"] = value({"exited": False})
    with pytest.raises(CommandUnfinished, match="did not end within"):
        await run(agent, ["sleep", "60"], timeout_s=1)
    assert fake.asked()[0] == "guest-exec"
    assert 5 < fake.asked().count("guest-exec-status") < 25


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
