"""What an agent that answers wrongly, or not at all, means to the caller."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

import vmherd.guest_agent
from tests.framework.fake_agent import Answer, FakeAgent, Held, Request, hang_up, never, raw, value
from vmherd.guest_agent import (
    AgentError,
    AgentNotRunning,
    AgentUnresponsive,
    CommandFailed,
    CommandUnavailable,
    GuestAgent,
    ProtocolError,
    errors,
)

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60
SHORT_S = 1.0
"""For what is never answered: what is takes milliseconds where nothing else runs."""


@pytest.mark.parametrize(
    "reply",
    [
        "hello\n",
        "[]\n",
        "{}\n",
        '{"id": ID}\n',
        '{"return": {}}\n',
        '{"return": {}, "id": "ID"}\n',
        '{"return": {}, "id": ID.0}\n',
        '{"return": {}, "error": {"class": "c", "desc": "d"}, "id": ID}\n',
        '{"error": "no", "id": ID}\n',
        '{"return": NaN, "id": ID}\n',
        '{"return": ' + "[" * 100_000 + "\n",
        '{"return": ' + "[" * 100 + "]" * 100 + ', "id": ID}\n',
        '{"return": [' + "{}," * 300_000 + '{}], "id": ID}\n',
        '{"return": "' + "x" * (5 << 20),
    ],
    ids=lambda reply: reply[:40],
)
async def test_a_reply_that_is_none(agent: GuestAgent, fake: FakeAgent, reply: str) -> None:
    fake.answers["guest-get-time"] = raw(reply)
    with pytest.raises(ProtocolError, match=r"guest-get-time: not a guest agent's reply: .*outcome unknown") as caught:
        await agent.execute("guest-get-time", timeout_s=TIMEOUT_S)
    assert caught.value.outcome_unknown
    assert await agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S) == 5


async def test_replies_with_other_ids_are_skipped(agent: GuestAgent, fake: FakeAgent) -> None:
    other = '{"return": "wrong", "id": 7}\n{"id": 8, "error": {"class": "GenericError", "desc": "wrong"}}\n'
    fake.answers["guest-get-time"] = raw(other * 5000 + '{"return": "right", "id": ID}\n')
    assert await agent.execute("guest-get-time", timeout_s=TIMEOUT_S) == "right"


async def test_a_flood_between_calls_is_skipped(agent: GuestAgent, fake: FakeAgent) -> None:
    flood = '{"return": "wrong", "id": 7}\n' * 20_000
    fake.answers["guest-get-time"] = raw('{"return": "right", "id": ID}\n' + flood)
    assert await agent.execute("guest-get-time", timeout_s=TIMEOUT_S) == "right"
    assert await agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S) == 5


@pytest.mark.parametrize(
    "unasked", [b"x", b"\n", b'{"return": "wrong", "id": 7}\n', b"\xff" * (1 << 20), b"x" * (9 << 20)]
)
async def test_what_comes_unasked_is_nobodys_answer(agent: GuestAgent, fake: FakeAgent, unasked: bytes) -> None:
    for number in range(3):
        with contextlib.suppress(ProtocolError):  # if it is still on its way when the call begins
            assert await agent.execute("guest-sync", {"id": number}, timeout_s=TIMEOUT_S) == number
        assert await agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S) == 5
        await fake.send(unasked)


async def test_an_endless_flood_lasts_until_the_deadline(agent: GuestAgent, fake: FakeAgent) -> None:
    async def flood(_: Request) -> bytes:
        while True:
            await fake.send(b'{"return": "wrong", "id": 7}\n' * 100)
            await asyncio.sleep(0)

    fake.answers["guest-get-time"] = flood
    with pytest.raises(AgentUnresponsive) as caught:
        await agent.execute("guest-get-time", timeout_s=SHORT_S)
    assert caught.value.elapsed_s < TIMEOUT_S / 2


@pytest.mark.parametrize(
    "junk", ["junk\n" * 1000, "x" * (9 << 20), "\ufffd{}", '{"return": 5, "id": ID}\n', "{" * 1000], ids=range(5)
)
async def test_junk_before_the_answer_to_a_sync(agent: GuestAgent, fake: FakeAgent, junk: str) -> None:
    async def sync(request: Request) -> bytes:
        return await raw(junk)(request) + request.success(request.arguments["id"])

    fake.answers["guest-sync-delimited"] = sync
    await agent.ping(timeout_s=TIMEOUT_S)


async def test_a_sync_that_answers_for_another(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-sync-delimited"] = value(5)
    with pytest.raises(AgentUnresponsive) as caught:
        await agent.ping(timeout_s=SHORT_S)
    assert not caught.value.outcome_unknown


async def test_a_line_without_end_in_place_of_a_sync(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-sync-delimited"] = raw("x" * (2 << 20))
    with pytest.raises(AgentUnresponsive, match="nothing answers") as caught:
        await agent.ping(timeout_s=SHORT_S)
    assert not caught.value.outcome_unknown


async def test_a_request_that_the_agent_cannot_parse(agent: GuestAgent, fake: FakeAgent) -> None:
    refusal = '{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n'
    fake.answers["guest-get-time"] = raw(refusal * 2)
    with pytest.raises(CommandFailed, match="JSON parse error"):
        await agent.execute("guest-get-time", timeout_s=TIMEOUT_S)
    assert await agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S) == 5


@pytest.mark.parametrize(
    "info",
    [
        value({"supported_commands": "all", "version": "1"}),
        value({"supported_commands": [{"name": 1, "enabled": True, "success-response": True}], "version": "1"}),
        value(None),
        raw('{"id": ID, "error": {"class": "CommandNotFound", "desc": "disabled"}}\n'),
        raw("nonsense\n"),
        hang_up,
        never,
    ],
)
async def test_a_refusal_is_certain_where_its_reason_is_not(agent: GuestAgent, fake: FakeAgent, info: Answer) -> None:
    fake.answers["guest-info"] = info
    with pytest.raises(CommandUnavailable, match="guest-make-coffee has not been found") as caught:
        await agent.execute("guest-make-coffee", timeout_s=SHORT_S)
    assert type(caught.value) is CommandUnavailable
    assert not caught.value.outcome_unknown


async def test_a_refusal_of_an_enabled_command_has_no_known_reason(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-get-time"] = raw('{"id": ID, "error": {"class": "CommandNotFound", "desc": "no"}}\n')
    with pytest.raises(CommandUnavailable) as caught:
        await agent.execute("guest-get-time", timeout_s=TIMEOUT_S)
    assert type(caught.value) is CommandUnavailable


async def test_info_is_checked(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-info"] = value({"version": 7, "supported_commands": []})
    with pytest.raises(ProtocolError, match="'version' is an integer, not a text") as caught:
        await agent.info(timeout_s=TIMEOUT_S)
    assert caught.value.command == "guest-info"


async def test_send_returns_once_the_agent_took_the_command(agent: GuestAgent, fake: FakeAgent) -> None:
    await agent.send("guest-shutdown", {"mode": "powerdown"}, timeout_s=TIMEOUT_S)
    assert fake.asked() == ["guest-shutdown", "guest-ping"]
    fake.blocked = {"guest-ping"}
    await agent.send("guest-shutdown", timeout_s=TIMEOUT_S)
    assert await agent.execute("guest-sync", {"id": 5}, timeout_s=TIMEOUT_S) == 5


@pytest.mark.parametrize("silence", [hang_up, never])
async def test_send_takes_silence_for_consent(agent: GuestAgent, fake: FakeAgent, silence: Answer) -> None:
    fake.answers["guest-shutdown"] = silence
    await agent.send("guest-shutdown", timeout_s=SHORT_S)
    assert fake.asked()[0] == "guest-shutdown"
    assert fake.asked().count("guest-shutdown") == 1


async def test_send_ends_when_the_guest_goes_down(agent: GuestAgent, fake: FakeAgent) -> None:
    held = fake.answers["guest-shutdown"] = Held()
    sending = asyncio.create_task(agent.send("guest-shutdown", timeout_s=TIMEOUT_S))
    await held.received.wait()
    agent.set_port_open(False)
    await sending


async def test_send_reports_an_error(agent: GuestAgent, fake: FakeAgent) -> None:
    fake.answers["guest-shutdown"] = raw('{"id": ID, "error": {"class": "GenericError", "desc": "no init"}}\n')
    with pytest.raises(CommandFailed, match="no init"):
        await agent.send("guest-shutdown", timeout_s=TIMEOUT_S)


async def test_send_reports_what_was_not_sent(agent: GuestAgent, fake: FakeAgent, path: Path) -> None:
    fake.answers["guest-sync-delimited"] = never
    with pytest.raises(AgentUnresponsive):
        await agent.send("guest-shutdown", timeout_s=SHORT_S)
    agent.set_port_open(False)
    with pytest.raises(AgentNotRunning):
        await agent.send("guest-shutdown", timeout_s=TIMEOUT_S)


async def test_arguments_that_json_cannot_carry_reach_nobody(agent: GuestAgent, fake: FakeAgent) -> None:
    with pytest.raises(ValueError, match="not JSON"):
        await agent.execute("guest-ping", {"x": float("nan")}, timeout_s=TIMEOUT_S)
    with pytest.raises(TypeError):
        await agent.execute("guest-ping", {"x": object()}, timeout_s=TIMEOUT_S)
    assert fake.clients == 0


def test_the_public_names_are_complete() -> None:
    public = vmherd.guest_agent.__all__
    assert len(set(public)) == len(public)
    assert all(hasattr(vmherd.guest_agent, name) for name in public)


def test_every_kind_of_error_is_public_and_drawn() -> None:
    assert errors.__doc__
    kinds = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, AgentError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert kind in vmherd.guest_agent.__all__
        assert kind in errors.__doc__
