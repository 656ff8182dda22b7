"""The controller, as the gateway sees it: one channel, its RPCs, and what their failures mean."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import structlog
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from vmherd.api.v1.file_pb2_grpc import FileServiceStub
from vmherd.gateway.descriptors import Method
from vmherd.model.errors import DeadlineExceeded, Unavailable, VmherdError
from vmherd.rpc.channel import open_channel
from vmherd.rpc.interceptors import unexpected
from vmherd.rpc.status import DOMAIN, status_of, to_status

READY_TIMEOUT_S = 1.0
CONNECTION_CHECK_INTERVAL_S = 0.5
NOT_CONNECTED = "failed to connect"
"""How gRPC's text begins where a call was never sent; in all other cases nobody knows what became of it."""

_log = structlog.get_logger()


class Upstream:
    """The controller behind a unix socket. It need not be there yet, and may come and go.

    `files` is the stub of the one service that is not found by its annotations.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel = open_channel(socket)
        self._health: Any = HealthStub(self._channel)
        self.files: Any = FileServiceStub(self._channel)

    async def close(self) -> None:
        """Ends the channel and every call on it."""
        await self._channel.close()

    def stub(self, method: Method) -> Callable[..., Any]:
        """What starts a call of this method: a request and a `timeout` in seconds or None go in, a call comes out."""
        descriptor = method.descriptor
        multi_callable = self._channel.unary_stream if descriptor.server_streaming else self._channel.unary_unary
        return multi_callable(
            f"/{descriptor.containing_service.full_name}/{descriptor.name}",
            request_serializer=GetMessageClass(descriptor.input_type).SerializeToString,
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )

    async def check_ready(self) -> None:
        """Asks the controller whether it is ready for calls.

        Raises:
            Unavailable: it cannot be reached, does not answer within `READY_TIMEOUT_S`, or says that it is not ready.
        """
        try:
            answer = await self._health.Check(HealthCheckRequest(), timeout=READY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            why = f"the controller at {self._socket} did not answer within {READY_TIMEOUT_S:g} s"
            raise Unavailable(why, reason="CONTROLLER_UNRESPONSIVE") from error
        if answer.status != HealthCheckResponse.SERVING:
            says = HealthCheckResponse.ServingStatus.Name(answer.status)
            why = f"the controller at {self._socket} answers, but says that it is {says}"
            raise Unavailable(why, reason="CONTROLLER_NOT_READY")

    async def log_connection(self) -> None:
        """Connects, and logs when the controller is reached and when it is lost, until it is cancelled."""
        was_ready = None
        while True:
            # gRPC can tell a change as it comes, but that cannot be cancelled and outlives the event loop.
            state = self._channel.get_state(try_to_connect=True)
            if state in {grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE}:
                is_ready = state is grpc.ChannelConnectivity.READY
                if is_ready and not was_ready:
                    _log.info("controller reached", socket=str(self._socket))
                if not is_ready and was_ready is not False:
                    _log.warning("waiting for the controller", socket=str(self._socket))
                was_ready = is_ready
            await asyncio.sleep(CONNECTION_CHECK_INTERVAL_S)

    def status(self, error: Exception, where: str) -> Status:
        """The status for whatever went wrong in `where`."""
        if isinstance(error, grpc.aio.AioRpcError):
            return self._call_status(error)
        return to_status(error if isinstance(error, VmherdError) else unexpected(where, error))

    def _call_status(self, error: grpc.aio.AioRpcError) -> Status:
        status = status_of(error)
        if status.details:
            return status
        # The controller gives every error its details, so this one is of the connection or of this end of the call.
        cause = error.details() or ""
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            unknown = not cause.startswith(NOT_CONNECTED)
            return to_status(
                Unavailable(
                    f"the controller cannot be reached at {self._socket}; is `vmherd controller` running?"
                    + ("; outcome unknown" if unknown else ""),
                    reason="CONTROLLER_UNREACHABLE",
                    metadata={"socket": self._socket, "cause": cause, "outcome_unknown": unknown},
                )
            )
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return to_status(
                DeadlineExceeded(
                    "time was up before the controller answered; outcome unknown",
                    reason="GRPC_TIMEOUT",
                    metadata={"outcome_unknown": True},
                )
            )
        status.details.add().Pack(ErrorInfo(reason=error.code().name, domain=DOMAIN))
        return status
