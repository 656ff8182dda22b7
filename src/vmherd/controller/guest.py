"""GuestService: one handler for every agent command, made from the service's descriptor."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from vmherd.api.v1 import guest_pb2
from vmherd.controller import commands, convert
from vmherd.controller.agent_calls import Context, time_left_s, to_vmherd_error
from vmherd.controller.agent_json import Mismatch, arguments_of, fill
from vmherd.controller.freeze import THAW_AFTER_DEFAULT_S, THAW_AFTER_MAX_S
from vmherd.controller.herd import Herd
from vmherd.controller.supervisor import Supervisor
from vmherd.guest_agent import AgentError
from vmherd.guest_agent.wire import MAX_FILE_READ_BYTES, MalformedReply, parse_json
from vmherd.model import errors
from vmherd.model.errors import FieldViolation, InvalidArgument

SERVICE = guest_pb2.DESCRIPTOR.services_by_name["GuestService"]

THAW_AFTER_MIN_S = 1.0

ARGUMENTS_JSON_MAX_CHARACTERS = 1 << 20

_COMMAND_NAME = re.compile(r"[A-Za-z_][-A-Za-z0-9_.]{0,99}")


def command_of(method: MethodDescriptor) -> str:
    """The agent command of an RPC: NetworkGetInterfaces is guest-network-get-interfaces."""
    return "guest" + re.sub(r"(?=[A-Z])", "-", method.name).lower()


COMMANDS: dict[str, str] = {method.name: command_of(method) for method in SERVICE.methods if method.name != "Execute"}
"""The agent's command of each RPC that is one."""


class GuestServicer:
    """See protos/vmherd/api/v1/guest.proto. The handlers of the agent's commands are added below."""

    def __init__(self, herd: Herd, agent_timeout_s: float) -> None:
        self._herd = herd
        self._agent_timeout_s = agent_timeout_s

    async def call(self, method: MethodDescriptor, request: Any, context: Context) -> Message:
        """Carries out the agent command of an RPC."""
        supervisor = self._herd.find(request.name)
        command = COMMANDS[method.name]
        _check(command, request)
        result = await self._execute(supervisor, request, command, arguments_of(request), context)
        response = GetMessageClass(method.output_type)()
        try:
            fill(response, result)
        except Mismatch as error:
            raise errors.Aborted(
                f"{request.name!r}: {command} was answered with nonsense: {error}",
                reason="AGENT_REPLY_MALFORMED",
                metadata={"name": request.name, "command": command},
            ) from error
        return response

    async def Execute(self, request: guest_pb2.GuestExecuteRequest, context: Context) -> guest_pb2.GuestExecuteResponse:
        supervisor = self._herd.find(request.name)
        if not _COMMAND_NAME.fullmatch(request.command):
            raise InvalidArgument.of(
                [FieldViolation("command", "must be the name of an agent's command, such as guest-get-osinfo")]
            )
        arguments = _parse_arguments(request.arguments_json)
        result = await self._execute(supervisor, request, request.command, arguments, context)
        return guest_pb2.GuestExecuteResponse(result_json=json.dumps(result, ensure_ascii=False, allow_nan=False))

    async def _execute(
        self,
        supervisor: Supervisor,
        request: Any,
        command: str,
        arguments: Mapping[str, object],
        context: Context,
    ) -> object:
        try:
            return await commands.execute(
                supervisor,
                command,
                arguments,
                timeout_s=time_left_s(context, commands.timeout_default_s(command, self._agent_timeout_s)),
                thaw_after_s=_thaw_after_s(request),
            )
        except AgentError as error:
            raise to_vmherd_error(error, request.name) from error
        except ValueError as error:  # no request to the agent, or no reply of it, has room for what is asked
            raise InvalidArgument(f"{request.name!r}: {error}") from error


def _thaw_after_s(request: Message) -> float:
    """After how long a freeze must end; it means nothing to the commands that freeze nothing."""
    if "thaw_after" not in request.DESCRIPTOR.fields_by_name:
        return THAW_AFTER_DEFAULT_S
    return convert.seconds(
        request, "thaw_after", default_s=THAW_AFTER_DEFAULT_S, minimum_s=THAW_AFTER_MIN_S, maximum_s=THAW_AFTER_MAX_S
    )


def _parse_arguments(text: str) -> dict[str, object]:
    if len(text) > ARGUMENTS_JSON_MAX_CHARACTERS:
        raise _wrong_arguments(f"is longer than {ARGUMENTS_JSON_MAX_CHARACTERS} characters")
    try:
        arguments = parse_json(text.encode()) if text else {}
    except MalformedReply as error:
        raise _wrong_arguments(str(error)) from error
    if not isinstance(arguments, dict):
        raise _wrong_arguments('must be a JSON object such as {"path": "/etc"}')
    return arguments


def _wrong_arguments(why: str) -> InvalidArgument:
    return InvalidArgument.of([FieldViolation("arguments_json", why)])


_REFUSED: dict[str, tuple[Callable[[Any], bool], FieldViolation]] = {
    "guest-file-read": (
        lambda request: request.count > MAX_FILE_READ_BYTES,
        FieldViolation("count", f"must be at most {MAX_FILE_READ_BYTES}; read again for more"),
    ),
    "guest-file-seek": (
        lambda request: not (request.whence_name or request.HasField("whence_value")),
        FieldViolation("whence_name", "must be one of SET, CUR, END"),
    ),
    "guest-set-user-password": (
        lambda request: b"\0" in request.password,  # the agent would set what stands before it, and report success
        FieldViolation("password", "must not hold a NUL character"),
    ),
}
"""What the agent would take and should not, or refuse in words that lead nowhere."""


def _check(command: str, request: Message) -> None:
    if command in _REFUSED:
        is_wrong, violation = _REFUSED[command]
        if is_wrong(request):
            raise InvalidArgument.of([violation])


def _handler(method: MethodDescriptor) -> Callable[[GuestServicer, Any, Context], Awaitable[Message]]:
    async def handle(self: GuestServicer, request: Any, context: Context) -> Message:
        return await self.call(method, request, context)

    return handle


for _name in COMMANDS:
    setattr(GuestServicer, _name, _handler(SERVICE.methods_by_name[_name]))
