"""Server streams over HTTP: newline-delimited JSON as grpc-gateway has it, or server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from starlette.types import Send

from vmherd.gateway.errors import status_json
from vmherd.model.errors import Unavailable

HEARTBEAT_S = 15.0
"""An answer with nothing to say for this long gets a heartbeat, so that nobody in between takes it for dead."""


@dataclass(frozen=True)
class Format:
    """How messages and a last error stand in the body; both come in as one line of JSON."""

    media_type: str
    message: str
    error: str
    heartbeat: str


LINES = Format("application/x-ndjson", message='{"result":%s}\n', error='{"error":%s}\n', heartbeat="")
EVENTS = Format("text/event-stream", message="data: %s\n\n", error="event: error\ndata: %s\n\n", heartbeat=": \n\n")


def format_for(accept: str) -> Format:
    """What a request with this Accept header gets."""
    wanted = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return EVENTS if EVENTS.media_type in wanted else LINES


async def messages(
    call: Any, gone: asyncio.Future[None], closing: asyncio.Future[None]
) -> AsyncGenerator[Message | None]:
    """The messages of a call as they come, None for each `HEARTBEAT_S` without one; ends when the client has gone.

    Raises:
        grpc.aio.AioRpcError: the call failed.
        Unavailable: the gateway is shutting down.
    """
    reading: asyncio.Future[Any] | None = None
    try:
        while True:
            # A read that is cancelled ends its call, so one that outlasts a heartbeat is kept.
            reading = reading or asyncio.ensure_future(call.read())
            done, _ = await asyncio.wait(
                {reading, gone, closing}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if gone in done:
                return
            if closing in done:
                raise Unavailable("the gateway is shutting down", reason="GATEWAY_SHUTTING_DOWN")
            if not done:
                yield None
                continue
            message = reading.result()
            if message is grpc.aio.EOF:
                return
            reading = None
            yield message
    finally:
        call.cancel()
        if reading:
            await asyncio.gather(reading, return_exceptions=True)


class _Body:
    """A body whose head goes out with its first chunk, so that an error before it gets its own HTTP code."""

    def __init__(self, send: Send, media_type: str) -> None:
        self._send = send
        self._media_type = media_type
        self.is_started = False

    async def write(self, chunk: str, *, is_last: bool = False) -> None:
        if not self.is_started:
            headers = [
                (b"content-type", self._media_type.encode()),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),  # nginx would hold small chunks back
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self.is_started = True
        await self._send({"type": "http.response.body", "body": chunk.encode(), "more_body": not is_last})


async def send_stream(
    incoming: AsyncGenerator[Message | None],
    send: Send,
    form: Format,
    *,
    to_json: Callable[[Message], str],
    to_status: Callable[[Exception], Status],
) -> None:
    """Sends messages as the body of an answer, and an error that comes after the first of them as its last part.

    Raises:
        Exception: what went wrong before the first message; nothing was sent then.
    """
    body = _Body(send, form.media_type)
    try:
        async with contextlib.aclosing(incoming):
            async for message in incoming:
                await body.write(form.heartbeat if message is None else form.message % to_json(message))
    except Exception as error:
        if not body.is_started:
            raise
        await body.write(form.error % status_json(to_status(error)))
    await body.write("", is_last=True)
