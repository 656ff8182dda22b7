"""What every call that goes to a guest agent shares: its deadline, and what the agent's errors are over gRPC."""

from __future__ import annotations

from typing import Any

import grpc

from vmherd import guest_agent
from vmherd.guest_agent import AgentError
from vmherd.model import errors
from vmherd.model.errors import VmherdError

Context = grpc.aio.ServicerContext[Any, Any]

ANSWER_MARGIN_S = 0.05
"""How much earlier than the caller's deadline the agent's is, so that the caller still hears what went wrong."""

ERRORS: dict[type[AgentError], tuple[type[VmherdError], str]] = {
    guest_agent.AgentNotConfigured: (errors.FailedPrecondition, "AGENT_NOT_CONFIGURED"),
    guest_agent.AgentNotRunning: (errors.Unavailable, "AGENT_NOT_RUNNING"),
    guest_agent.AgentNotConnected: (errors.Unavailable, "AGENT_NOT_CONNECTED"),
    guest_agent.AgentUnresponsive: (errors.DeadlineExceeded, "AGENT_UNRESPONSIVE"),
    guest_agent.CommandNotFound: (errors.Unimplemented, "AGENT_COMMAND_NOT_FOUND"),
    guest_agent.CommandDisabled: (errors.PermissionDenied, "AGENT_COMMAND_DISABLED"),
    guest_agent.CommandUnavailable: (errors.Unimplemented, "AGENT_COMMAND_UNAVAILABLE"),
    guest_agent.AgentFrozen: (errors.FailedPrecondition, "AGENT_FROZEN"),
    guest_agent.CommandFailed: (errors.Aborted, "AGENT_COMMAND_FAILED"),
    guest_agent.CommandUnfinished: (errors.DeadlineExceeded, "COMMAND_UNFINISHED"),
    guest_agent.ProtocolError: (errors.Aborted, "AGENT_REPLY_MALFORMED"),
}


def to_vmherd_error(error: AgentError, name: str) -> VmherdError:
    """An agent's error as one of vmherd's; `metadata` has the fields that it carries."""
    kind, reason = next(ERRORS[base] for base in type(error).__mro__ if base in ERRORS)
    fields = {key: value for key, value in vars(error).items() if not key.startswith("_")}
    return kind(f"{name!r}: {error}", reason=reason, metadata={"name": name, **fields})


def time_left_s(context: Context, default_s: float) -> float:
    """How long the agent may take: until a little before the caller's deadline."""
    remaining_s = context.time_remaining()
    return default_s if remaining_s is None else max(0.0, remaining_s - ANSWER_MARGIN_S)
