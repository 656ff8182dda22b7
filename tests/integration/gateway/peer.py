"""A controller whose answers are written by the test: real gRPC on a real unix socket, nothing behind it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from vmherd.api.v1.controller_pb2 import DESCRIPTOR
from vmherd.api.v1.controller_pb2_grpc import ControllerServiceServicer, add_ControllerServiceServicer_to_server
from vmherd.rpc.serving import Services

Context = grpc.aio.ServicerContext[Any, Any]

Answer = Message | Exception | Callable[[Any, Context], Any]
"""What an RPC does: answer with a message, fail with an exception, or whatever a handler does."""

SERVICE = "vmherd.api.v1.ControllerService"


class Peer(ControllerServiceServicer):
    """Keeps every request, and does for each RPC what `answers` says; an RPC that it does not name is UNIMPLEMENTED."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all requests and answers."""
        self.answers: dict[str, Answer] = {}
        self.requests: list[Any] = []
        self.began = asyncio.Event()
        self.was_cancelled = asyncio.Event()

    @property
    def services(self) -> Services:
        """What `vmherd.rpc.serving.serving` takes."""
        return {SERVICE: lambda server: add_ControllerServiceServicer_to_server(self, server)}

    async def hang(self, _request: Any, _context: Context) -> Any:
        """A handler that never answers, and says that it began and that it was cancelled."""
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise

    def streaming(self, *messages: Message, then: Exception | None = None, hang: bool = False) -> Answer:
        """A handler that streams messages, and then ends, fails or hangs."""

        async def answer(request: Any, context: Context) -> AsyncIterator[Message]:
            for message in messages:
                yield message
            if then:
                raise then
            if hang:
                await self.hang(request, context)

        return answer

    async def answer(self, name: str, request: Any, context: Context) -> Any:
        """Does what the test says for an RPC with one answer."""
        self.requests.append(request)
        answer = self.answers.get(name)
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return await answer(request, context)
        if answer is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the test has no answer for this")
        return answer

    async def answer_stream(self, name: str, request: Any, context: Context) -> AsyncIterator[Any]:
        """Does what the test says for an RPC with a stream of answers."""
        answer = self.answers.get(name)
        if inspect.isasyncgenfunction(answer):
            self.requests.append(request)
            async for message in answer(request, context):
                yield message
        else:
            yield await self.answer(name, request, context)


def _handler(name: str, *, is_stream: bool) -> Callable[[Peer, Any, Context], Any]:
    async def single(self: Peer, request: Any, context: Context) -> Any:
        return await self.answer(name, request, context)

    async def stream(self: Peer, request: Any, context: Context) -> AsyncIterator[Any]:
        async for message in self.answer_stream(name, request, context):
            yield message

    return stream if is_stream else single


for _method in DESCRIPTOR.services_by_name["ControllerService"].methods:
    setattr(Peer, _method.name, _handler(_method.name, is_stream=_method.server_streaming))
