"""One HTTP route for each binding of an RPC."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Collection
from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from vmherd.gateway import proto_json, streams
from vmherd.gateway.errors import error_response
from vmherd.gateway.path_template import PathTemplate
from vmherd.gateway.transcoder import Binding
from vmherd.gateway.upstream import Upstream
from vmherd.model.errors import DeadlineExceeded, InvalidArgument, Unavailable

BODY_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 600.0
"""What a single call gets without the header: more than any command of ours takes by default. Where the request has a
timeout of its own, that comes on top. The controller is not told, for it has defaults for who names no time."""

CALL_GRACE_S = 0.8
MAX_TIMEOUT_S = 365 * 86400.0
"""gRPC counts in nanoseconds and 63 bits: what the header can say at most would lie in the past."""

_GRPC_TIMEOUT = re.compile("([0-9]{1,8})([HMSmun])")
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_JSON = re.compile(r'application/json\s*(;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)


class Closing:
    """Tells requests that the gateway is shutting down: streams at once, single calls after `CALL_GRACE_S`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.streams: asyncio.Future[None] = self._loop.create_future()
        self.calls: asyncio.Future[None] = self._loop.create_future()

    def begin(self) -> None:
        """Starts the shutdown."""
        self.streams.set_result(None)
        self._loop.call_later(CALL_GRACE_S, self.calls.set_result, None)


class RpcRoute(BaseRoute):
    """Answers one method and path with one RPC.

    It matches the path as it came: Starlette would decode it first, and an encoded slash would part a name in two.
    """

    def __init__(
        self, binding: Binding, pool: DescriptorPool, upstream: Upstream, closing: Closing, max_body_bytes: int
    ) -> None:
        self._binding = binding
        self._is_stream = binding.method.descriptor.server_streaming
        self.methods = {binding.http_method}
        if binding.http_method == "GET" and not self._is_stream:
            self.methods.add("HEAD")
        self._pool = pool
        self._upstream = upstream
        self._stub = upstream.stub(binding.method)
        self._closing = closing
        self._max_body_bytes = max_body_bytes

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether this route is for the request: PARTIAL where only the method differs."""
        return matched(self._binding.template, self.methods, scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Makes the call and sends what comes of it."""
        if scope["method"] not in self.methods:
            raise HTTPException(405)
        try:
            await self._answer(Request(scope, receive), send)
        except ClientDisconnect:
            return
        except Exception as error:
            await error_response(self._status(error))(scope, receive, send)

    def _status(self, error: Exception) -> Status:
        return self._upstream.status(error, self._binding.method.descriptor.full_name)

    async def _answer(self, request: Request, send: Send) -> None:
        timeout_s = grpc_timeout_s(request.headers)
        body = await read_body(request, self._max_body_bytes)
        message = self._binding.request(self._pool, request.scope["captured"], request.scope["query_string"], body)
        call = self._stub(message, timeout=timeout_s)
        try:
            async with disconnection(request.receive) as gone:
                if self._is_stream:
                    await self._stream(call, gone, request, send)
                else:
                    limit_s = CALL_TIMEOUT_S + own_timeout_s(message) if timeout_s is None else None
                    answer = await answer_of(call, gone, self._closing, limit_s=limit_s)
                    response = Response(self._json(answer), media_type="application/json")
                    await response(request.scope, request.receive, send)
        finally:
            call.cancel()

    async def _stream(self, call: Any, gone: asyncio.Future[None], request: Request, send: Send) -> None:
        form = streams.format_for(request.headers.get("accept", ""))
        incoming = streams.messages(call, gone, self._closing.streams)
        await streams.send_stream(incoming, send, form, to_json=self._json, to_status=self._status)

    def _json(self, message: Message) -> str:
        return proto_json.to_json(message, self._pool)


def matched(template: PathTemplate, methods: Collection[str], scope: Scope) -> tuple[Match, Scope]:
    """Whether a route with this template is for a request, and what the template's variables are there."""
    captured = template.match(scope["raw_path"].decode("ascii")) if scope["type"] == "http" else None
    if captured is None:
        return Match.NONE, {}
    return Match.FULL if scope["method"] in methods else Match.PARTIAL, {"captured": captured}


async def answer_of(
    call: Any, gone: asyncio.Future[None], closing: Closing, *, limit_s: float | None = None
) -> Message:
    """The answer of a call with one.

    Raises:
        grpc.aio.AioRpcError: the call failed.
        ClientDisconnect: the client went away first.
        DeadlineExceeded: `limit_s` was over first.
        Unavailable: the gateway is shutting down.
    """
    answered = asyncio.ensure_future(call)
    done, _ = await asyncio.wait({answered, gone, closing.calls}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        raise DeadlineExceeded(
            f"the controller did not answer within {limit_s:g} s; outcome unknown; Grpc-Timeout allows more",
            reason="GATEWAY_TIMEOUT",
            metadata={"outcome_unknown": True},
        )
    if gone.done():
        raise ClientDisconnect
    if not answered.done():
        raise Unavailable(
            "the gateway is shutting down before the controller answered; it may have done what was asked",
            reason="GATEWAY_SHUTTING_DOWN",
        )
    message: Message = answered.result()
    return message


@contextlib.asynccontextmanager
async def disconnection(receive: Receive) -> AsyncIterator[asyncio.Future[None]]:
    """A future that is done when the client of a request, whose body was read, has gone."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    waiting = asyncio.create_task(wait())
    try:
        yield waiting
    finally:
        waiting.cancel()


def grpc_timeout_s(headers: Headers) -> float | None:
    """What the Grpc-Timeout header allows a call, None without one.

    https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md has its syntax.

    Raises:
        InvalidArgument: the header is not a timeout.
    """
    text = headers.get("grpc-timeout")
    if text is None:
        return None
    found = _GRPC_TIMEOUT.fullmatch(text)
    if not found:
        raise InvalidArgument(
            f"the header Grpc-Timeout is {proto_json.shown(text)}; it takes up to 8 digits and one of H, M, S, m, u, n",
            reason="MALFORMED_TIMEOUT",
        )
    return min(int(found[1]) * _UNITS_S[found[2]], MAX_TIMEOUT_S)


def own_timeout_s(request: Message) -> float:
    """How long a request itself allows for what it asks for, in its field `timeout`; 0 without one."""
    field = request.DESCRIPTOR.fields_by_name.get("timeout")
    if not field or not field.message_type or field.message_type.full_name != Duration.DESCRIPTOR.full_name:
        return 0.0
    timeout: Duration = getattr(request, field.name)
    return max(0.0, min(timeout.seconds, MAX_TIMEOUT_S))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, empty where there is none.

    Raises:
        InvalidArgument: it is not declared as JSON, or larger than `max_bytes`, of which no more than that is kept.
        DeadlineExceeded: it takes longer than `BODY_TIMEOUT_S`.
        ClientDisconnect: the client went away.
    """
    too_large = InvalidArgument(f"the body is larger than {max_bytes} bytes", reason="BODY_TOO_LARGE")
    declared = int(request.headers.get("content-length", "0"))
    if declared > max_bytes:
        raise too_large
    content_type = request.headers.get("content-type", "")
    if (declared or "transfer-encoding" in request.headers) and not _JSON.fullmatch(content_type):
        raise InvalidArgument(
            f"the body's Content-Type is {proto_json.shown(content_type)}; this takes application/json in UTF-8",
            reason="MEDIA_TYPE_NOT_SUPPORTED",
        )
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise DeadlineExceeded(f"the body took longer than {BODY_TIMEOUT_S:g} s", reason="BODY_TOO_SLOW") from error
    return bytes(body)
