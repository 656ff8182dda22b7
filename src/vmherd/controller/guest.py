"""GuestService: one handler for every agent command, made from the service's descriptor, and Run."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from vmherd import guest_agent
from vmherd.api.v1 import guest_pb2
from vmherd.controller import convert
from vmherd.controller.agent_json import Mismatch, arguments_of, fill
from vmherd.controller.herd import Herd
from vmherd.guest_agent import AgentError
from vmherd.model import errors
from vmherd.model.errors import FieldViolation, InvalidArgument, VmherdError

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = guest_pb2.DESCRIPTOR.services_by_name["GuestService"]
RUN = SERVICE.methods_by_name["Run"]
"""The one RPC that is no command of the agent."""

RUN_TIMEOUT_DEFAULT_S = 60.0
RUN_TIMEOUT_MIN_S = 0.001
ANSWER_MARGIN_S = 0.05
"""How much earlier than the caller's deadline the agent's is, so that the caller still hears what went wrong."""

WORDS_MAX = 1024
INPUT_MAX_BYTES = 16 << 20
NAME_SHOWN = 64
"""How much of a wrong variable's name an error shows."""

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
"""What an error of the agent is to those who call over gRPC."""


def to_vmherd_error(error: AgentError, name: str) -> VmherdError:
    """An agent's error as one of vmherd's; `metadata` has the fields that it carries."""
    kind, reason = next(ERRORS[base] for base in type(error).__mro__ if base in ERRORS)
    fields = {key: value for key, value in vars(error).items() if not key.startswith("_")}
    return kind(f"{name!r}: {error}", reason=reason, metadata={"name": name, **fields})


def command_of(method: MethodDescriptor) -> str:
    """The agent command of an RPC: NetworkGetInterfaces is guest-network-get-interfaces."""
    return "guest" + re.sub(r"(?=[A-Z])", "-", method.name).lower()


class GuestServicer:
    """See protos/vmherd/api/v1/guest.proto. The handlers of the agent's commands are added below."""

    def __init__(self, herd: Herd, agent_timeout_s: float) -> None:
        self._herd = herd
        self._agent_timeout_s = agent_timeout_s

    async def call(self, method: MethodDescriptor, request: Any, context: Context) -> Message:
        """Carries out the agent command of an RPC."""
        agent = self._herd.find(request.name).open_agent()
        response = GetMessageClass(method.output_type)()
        try:
            result = await agent.execute(
                command_of(method), arguments_of(request), timeout_s=self._timeout_s(context, self._agent_timeout_s)
            )
            fill(response, result)
        except AgentError as error:
            raise to_vmherd_error(error, request.name) from error
        except Mismatch as error:
            raise errors.Aborted(
                f"{request.name!r}: {command_of(method)} was answered with nonsense: {error}",
                reason="AGENT_REPLY_MALFORMED",
                metadata={"name": request.name},
            ) from error
        return response

    async def Run(self, request: guest_pb2.RunRequest, context: Context) -> guest_pb2.RunResponse:
        violations = list(_check_run(request))
        if violations:
            raise InvalidArgument.of(violations)
        timeout_s = convert.seconds(request, "timeout", default_s=RUN_TIMEOUT_DEFAULT_S, minimum_s=RUN_TIMEOUT_MIN_S)
        agent = self._herd.find(request.name).open_agent()
        try:
            result = await guest_agent.run(
                agent,
                list(request.command),
                input_data=request.input,
                env=dict(request.environment) or None,
                timeout_s=min(timeout_s, self._timeout_s(context, timeout_s)),
            )
        except AgentError as error:
            raise to_vmherd_error(error, request.name) from error
        stdout, stdout_raw = _text(result.stdout)
        stderr, stderr_raw = _text(result.stderr)
        return guest_pb2.RunResponse(
            exit_code=128 + result.signal if result.signal is not None else result.exit_code or 0,
            signal=result.signal,
            stdout=stdout,
            stderr=stderr,
            stdout_raw=stdout_raw,
            stderr_raw=stderr_raw,
            stdout_truncated=result.stdout_truncated,
            stderr_truncated=result.stderr_truncated,
        )

    @staticmethod
    def _timeout_s(context: Context, default_s: float) -> float:
        remaining_s = context.time_remaining()
        return default_s if remaining_s is None else max(0.0, remaining_s - ANSWER_MARGIN_S)


def _handler(method: MethodDescriptor) -> Callable[[GuestServicer, Any, Context], Awaitable[Message]]:
    async def handle(self: GuestServicer, request: Any, context: Context) -> Message:
        return await self.call(method, request, context)

    return handle


for _method in SERVICE.methods:
    if _method is not RUN:
        setattr(GuestServicer, _method.name, _handler(_method))


def _check_run(request: guest_pb2.RunRequest) -> list[FieldViolation]:
    violations = []
    if not request.command or not request.command[0]:
        violations.append(FieldViolation("command", 'must be a list of words, such as ["uname", "-a"]'))
    if len(request.command) > WORDS_MAX:
        violations.append(FieldViolation("command", f"must have at most {WORDS_MAX} words"))
    if any("\0" in word for word in request.command):
        violations.append(FieldViolation("command", "must not hold a NUL character"))
    for key, value in request.environment.items():
        if not key or "=" in key or "\0" in key + value:
            field = f"environment[{key[:NAME_SHOWN]!r}]"
            violations.append(FieldViolation(field, "a name is not empty, and without '=' and NUL"))
    if len(request.input) > INPUT_MAX_BYTES:
        violations.append(FieldViolation("input", f"must have at most {INPUT_MAX_BYTES} bytes"))
    return violations


def _text(output: bytes) -> tuple[str, bytes | None]:
    """Output as text, and the exact bytes where the text had to replace something."""
    try:
        return output.decode(), None
    except UnicodeDecodeError:
        return output.decode(errors="replace"), output
