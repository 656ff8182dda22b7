"""What every call that goes to a guest agent shares: its deadline, and what the agent's errors are over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc

from vmherd import guest_agent
from vmherd.guest_agent import AgentError, file_errors
from vmherd.model import errors
from vmherd.model.errors import VmherdError

T = TypeVar("T")

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
    guest_agent.CommandTimedOut: (errors.DeadlineExceeded, "COMMAND_TIMED_OUT"),
    guest_agent.CommandUnfinished: (errors.DeadlineExceeded, "COMMAND_UNFINISHED"),
    guest_agent.ProtocolError: (errors.Aborted, "AGENT_REPLY_MALFORMED"),
    file_errors.FileMissing: (errors.NotFound, "GUEST_FILE_NOT_FOUND"),
    file_errors.FileForbidden: (errors.PermissionDenied, "GUEST_FILE_FORBIDDEN"),
    file_errors.FileUnsuitable: (errors.FailedPrecondition, "GUEST_FILE_UNSUITABLE"),
    file_errors.GuestFull: (errors.ResourceExhausted, "GUEST_FULL"),
    file_errors.FileChanged: (errors.Aborted, "GUEST_FILE_CHANGED"),
}

HINTS: dict[type[AgentError], str] = {
    # The agent of QEMU 7.2, for one, calls disabled also what its build or the guest's system cannot do.
    guest_agent.CommandDisabled: "whoever configured the agent forbids it, or its system cannot do it",
    guest_agent.AgentFrozen: "thaw the guest's file systems first",
}
"""What to make of an error whose text is the agent's own."""


def to_vmherd_error(error: AgentError, name: str) -> VmherdError:
    """An agent's error as one of vmherd's; `metadata` has the fields that it carries."""
    kind, reason = next(ERRORS[base] for base in type(error).__mro__ if base in ERRORS)
    fields = {key: value for key, value in vars(error).items() if not key.startswith("_")}
    hint = f"; {HINTS[type(error)]}" if type(error) in HINTS else ""
    return kind(f"{name!r}: {error}{hint}", reason=reason, metadata={"name": name, **fields})


def time_left_s(context: Context, default_s: float, *, tidy_up_s: float = 0.0) -> float:
    """How long the agent may take: until a little before the caller's deadline.

    Of that time up to a quarter, and `tidy_up_s` at most, is kept for what comes after it.
    """
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return default_s
    left_s = max(0.0, remaining_s - ANSWER_MARGIN_S)
    return left_s - min(tidy_up_s, left_s / 4)


async def next_request(requests: AsyncIterator[T], *, timeout_s: float) -> T | None:
    """The next of a caller's requests, None after the last; raises `DeadlineExceeded` when it does not come."""
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(requests, None)
    except TimeoutError as error:
        raise errors.DeadlineExceeded(f"the caller sent nothing for {timeout_s:g} s", reason="CALLER_SILENT") from error
