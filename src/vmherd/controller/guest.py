"""GuestService: one handler for every agent command, made from the service's descriptor."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from vmherd.api.v1 import guest_pb2
from vmherd.controller import commands
from vmherd.controller.agent_calls import Context, time_left_s, to_vmherd_error
from vmherd.controller.agent_json import Mismatch, arguments_of, fill
from vmherd.controller.herd import Herd
from vmherd.guest_agent import AgentError
from vmherd.model import errors

SERVICE = guest_pb2.DESCRIPTOR.services_by_name["GuestService"]


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
        supervisor = self._herd.find(request.name)
        response = GetMessageClass(method.output_type)()
        try:
            result = await commands.execute(
                supervisor,
                command_of(method),
                arguments_of(request),
                timeout_s=time_left_s(context, self._agent_timeout_s),
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


def _handler(method: MethodDescriptor) -> Callable[[GuestServicer, Any, Context], Awaitable[Message]]:
    async def handle(self: GuestServicer, request: Any, context: Context) -> Message:
        return await self.call(method, request, context)

    return handle


for _method in SERVICE.methods:
    setattr(GuestServicer, _method.name, _handler(_method))
