"""What an error of the guest agent is to those who call over gRPC."""

from __future__ import annotations

import inspect

import pytest

from vmherd import guest_agent
from vmherd.controller.agent_calls import ERRORS, to_vmherd_error
from vmherd.controller.guest import SERVICE, command_of
from vmherd.guest_agent import AgentError
from vmherd.rpc.status import to_status

KINDS = [kind for kind in vars(guest_agent).values() if inspect.isclass(kind) and issubclass(kind, AgentError)]
GROUPS = {guest_agent.AgentError, guest_agent.AgentUnavailable}
"""Nothing is only one of these."""


def test_each_kind_has_a_reason_of_its_own() -> None:
    assert set(KINDS) - GROUPS == set(ERRORS)
    assert len({reason for _, reason in ERRORS.values()}) == len(ERRORS)


@pytest.mark.parametrize("kind", list(ERRORS))
def test_an_error_keeps_its_text_and_its_fields(kind: type[AgentError]) -> None:
    fields = {"command": "guest-ping", "elapsed_s": 1.5}
    if kind is guest_agent.CommandFailed:
        error = kind("GenericError", "it is broken", **fields)
    else:
        error = kind("it is broken", **fields | ({"pid": 42} if kind is guest_agent.CommandUnfinished else {}))
    translated = to_vmherd_error(error, "web")
    assert (type(translated), translated.reason) == ERRORS[kind]
    assert translated.message.startswith("'web': ")
    assert "it is broken" in translated.message
    assert translated.metadata["name"] == "web"
    assert translated.metadata["command"] == "guest-ping"
    assert translated.metadata.get("pid") == ("42" if kind is guest_agent.CommandUnfinished else None)
    assert to_status(translated).details


def test_commands_are_named_after_the_rpcs() -> None:
    assert command_of(SERVICE.methods_by_name["NetworkGetInterfaces"]) == "guest-network-get-interfaces"
    assert command_of(SERVICE.methods_by_name["Ping"]) == "guest-ping"
