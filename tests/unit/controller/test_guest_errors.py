"""What an error of the guest agent is to those who call over gRPC."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from vmherd import guest_agent
from vmherd.controller.agent_calls import ERRORS, to_vmherd_error
from vmherd.controller.guest import SERVICE, command_of
from vmherd.guest_agent import AgentError, file_errors
from vmherd.rpc.status import to_status

GROUPS = {guest_agent.AgentError, guest_agent.AgentUnavailable, file_errors.FileError}
"""Nothing is only one of these."""

ARGUMENTS: dict[str, Any] = {
    "message": "it is broken",
    "error_class": "GenericError",
    "desc": "it is broken",
    "command": "guest-ping",
    "elapsed_s": 1.5,
    "pid": 42,
    "path": "/etc/motd",
}


def kinds_of(base: type[AgentError]) -> Iterator[type[AgentError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds_of(kind)


def made(kind: type[AgentError], **more: Any) -> AgentError:
    return kind(**{name: ARGUMENTS[name] for name in inspect.signature(kind).parameters if name in ARGUMENTS} | more)


def test_each_kind_has_a_reason_of_its_own() -> None:
    assert set(kinds_of(AgentError)) - GROUPS == set(ERRORS)
    assert len({reason for _, reason in ERRORS.values()}) == len(ERRORS)


@pytest.mark.parametrize("kind", list(ERRORS))
def test_an_error_keeps_its_text_and_its_fields(kind: type[AgentError]) -> None:
    translated = to_vmherd_error(made(kind), "web")
    assert (type(translated), translated.reason) == ERRORS[kind]
    assert translated.message.startswith("'web': ")
    assert "it is broken" in translated.message
    assert translated.metadata["name"] == "web"
    assert translated.metadata["command"] == "guest-ping"
    for name in ("pid", "path"):
        assert translated.metadata.get(name) == (str(ARGUMENTS[name]) if hasattr(made(kind), name) else None)
    assert to_status(translated).details


@pytest.mark.parametrize("unknown", [True, False])
def test_whether_the_outcome_is_known_is_said_to_people_and_to_programs(unknown: bool) -> None:
    translated = to_vmherd_error(made(guest_agent.AgentUnresponsive, outcome_unknown=unknown), "web")
    assert translated.message.endswith("; outcome unknown") is unknown
    assert translated.metadata["outcome_unknown"] == str(unknown)


def test_what_an_agent_calls_disabled_may_be_more_than_that() -> None:
    assert "or its system cannot do it" in to_vmherd_error(made(guest_agent.CommandDisabled), "web").message


def test_commands_are_named_after_the_rpcs() -> None:
    assert command_of(SERVICE.methods_by_name["NetworkGetInterfaces"]) == "guest-network-get-interfaces"
    assert command_of(SERVICE.methods_by_name["Ping"]) == "guest-ping"
