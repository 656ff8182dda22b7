"""Server interceptors: errors become a status, callers on TCP show a token."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc
import structlog

from vmherd.model.errors import InternalError, Unauthenticated, Unavailable, VmherdError
from vmherd.rpc.status import DETAILS_KEY, to_status

_log = structlog.get_logger()

HANDLER_END_TIMEOUT_S = 0.5

_MAKERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""By whether the request is a stream, and whether the response is one."""

if TYPE_CHECKING:  # grpc's classes are generic in their type stubs alone
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]
    Context = grpc.aio.ServicerContext[Any, Any]


async def _abort(context: Context, error: VmherdError) -> NoReturn:
    status = to_status(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, ((DETAILS_KEY, status.SerializeToString()),))


def unexpected(method: str, error: Exception) -> InternalError:
    """Logs an exception that nobody foresaw; the caller learns an incident id and nothing of its text."""
    incident_id = uuid.uuid4().hex[:12]
    _log.error("unexpected exception", method=method, incident_id=incident_id, exc_info=error)
    return InternalError(
        f"internal error; the log has the details under incident id {incident_id}",
        metadata={"incident_id": incident_id},
    )


class ErrorsToStatus(grpc.aio.ServerInterceptor):
    """Turns a `VmherdError` into its status, any other exception into INTERNAL without its text.

    It knows the calls that are under way, to end them with the server: gRPC itself breaks them off without a word.
    """

    def __init__(self) -> None:
        self._streams: set[asyncio.Task[Any]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._ending = False

    def end_streams(self) -> None:
        """Answers every stream that is open with UNAVAILABLE; streams have no end of their own."""
        self._ending = True
        for task in self._streams:
            task.cancel()

    async def wait_ended(self) -> None:
        """Waits until no handler runs any more: gRPC only tells them to end."""
        if running := self._streams | self._calls:
            await asyncio.wait(running, timeout=HANDLER_END_TIMEOUT_S)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wraps a handler; a request that is a stream is passed on as it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        stream: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream
        single: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }

        # Writes, where it could yield: so a cancel always comes up in here, and ends the handler, before the call ends.
        async def answer_stream(request: Any, context: Context) -> None:
            async with (
                self._errors_told(method, context, self._streams),
                contextlib.aclosing(stream(request, context)) as responses,
            ):
                async for response in responses:
                    await context.write(response)

        async def answer(request: Any, context: Context) -> Any:
            async with self._errors_told(method, context, self._calls):
                return await single(request, context)

        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        wrapped: Handler = make(answer_stream if handler.response_streaming else answer, **serializers)
        return wrapped

    @contextlib.asynccontextmanager
    async def _errors_told(
        self, method: str, context: Context, under_way: set[asyncio.Task[Any]]
    ) -> AsyncIterator[None]:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        under_way.add(task)
        try:
            yield
        except VmherdError as error:
            await _abort(context, error)
        except asyncio.CancelledError:
            if not (self._ending and task in self._streams):
                raise
            await _abort(context, Unavailable("the server is shutting down; ask again", reason="SHUTTING_DOWN"))
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # the second is gRPC's word for a write that failed because the caller has left
        except Exception as error:
            await _abort(context, unexpected(method, error))
        finally:
            under_way.discard(task)


class TokenOnTcp(grpc.aio.ServerInterceptor):
    """Asks callers for the bearer token, except on the unix socket, whose file mode says who may connect."""

    def __init__(self, token: str) -> None:
        self._expected = token.encode()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Lets the call through, or answers UNAUTHENTICATED in its place."""
        handler = await continuation(handler_call_details)
        if handler is None or self._shown_in(handler_call_details):
            return handler

        async def refuse(_request: Any, context: Context) -> Any:
            await _abort(
                context,
                Unauthenticated(
                    "this port needs the metadata `authorization: Bearer TOKEN`; the token is in the run directory",
                    reason="TOKEN_NEEDED",
                ),
            )

        return grpc.unary_unary_rpc_method_handler(
            refuse,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _shown_in(self, handler_call_details: grpc.HandlerCallDetails) -> bool:
        metadata = dict(handler_call_details.invocation_metadata or ())
        scheme, _, shown = str(metadata.get("authorization", "")).partition(" ")
        return hmac.compare_digest(shown.encode(), self._expected) and scheme.lower() == "bearer"
