"""Replies of agents that are not here: what their errors are to us, and what the typed responses make of results."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass

from tests.contract.guest_commands.replies import REFUSALS, REPLIES, Refusal
from tests.framework.fake_agent import FakeAgent, Request, value
from vmherd.controller.agent_calls import ERRORS
from vmherd.controller.agent_json import fill
from vmherd.controller.guest import COMMANDS, SERVICE
from vmherd.guest_agent import AgentError, CommandFailed, GuestAgent

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
async def test_an_error_means_the_same_on_every_version(refusal: Refusal) -> None:
    async def refuse(request: Request) -> bytes:
        return request.failure(refusal.error_class, refusal.desc)

    # Socket paths hold 107 bytes, so this is not pytest's own directory.
    with tempfile.TemporaryDirectory(prefix="vmherd-") as folder:
        path = Path(folder) / "agent.sock"
        async with FakeAgent(path) as fake, GuestAgent(path) as agent:
            fake.answers[refusal.command] = refuse
            fake.answers["guest-info"] = value(refusal.info())
            fake.answers["guest-fsfreeze-status"] = value("frozen" if refusal.frozen else "thawed")
            with pytest.raises(AgentError) as caught:
                await agent.execute(refusal.command, timeout_s=TIMEOUT_S)
    assert type(caught.value) is refusal.kind
    assert refusal.command in str(caught.value)
    if isinstance(caught.value, CommandFailed):
        assert caught.value.desc == refusal.desc
    assert type(caught.value) in ERRORS


@pytest.mark.parametrize(("rpc", "result", "expected"), REPLIES, ids=[rpc for rpc, _, _ in REPLIES])
def test_a_result_fills_its_response(rpc: str, result: object, expected: dict[str, object]) -> None:
    assert rpc in COMMANDS
    response = GetMessageClass(SERVICE.methods_by_name[rpc].output_type)
    filled = response()
    fill(filled, result)
    assert filled == json_format.ParseDict(expected, response())
