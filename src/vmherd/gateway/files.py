"""Files of a guest over HTTP: the plain bytes as body, in any size and in constant memory.

The last bytes of a file are held back until the controller has said that all is well. A copy that fails in the middle
breaks its connection off, so no client takes a part for the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import re
from collections.abc import AsyncGenerator, Mapping
from email.utils import formatdate
from typing import Any
from urllib.parse import quote

import grpc
import structlog
from google.protobuf.descriptor_pool import DescriptorPool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from vmherd.api.v1.file_pb2 import FileDescription, ReadFileRequest, WriteFileHeader, WriteFileRequest
from vmherd.gateway import path_template, proto_json, streams
from vmherd.gateway.errors import error_response
from vmherd.gateway.routes import Closing, answer_of, disconnection, grpc_timeout_s, matched, read_body
from vmherd.gateway.transcoder import pairs
from vmherd.gateway.upstream import Upstream
from vmherd.model.errors import Aborted, DeadlineExceeded, FailedPrecondition, FieldViolation, InvalidArgument
from vmherd.rpc.channel import READY

TEMPLATE = path_template.parse("/v1/instances/{name}/files")

BODY_IDLE_TIMEOUT_S = 600.0
"""How long nothing of an upload may come: what makes its bytes may need a while."""

SIZE_MAX_BYTES = (1 << 63) - 1

_OCTAL = re.compile("0?[0-7]{1,4}")
_PARAMETERS = {"GET": ("path", "archive"), "HEAD": ("path", "archive"), "PUT": ("path", "archive", "mode")}
_PARTIAL = ("content-encoding", "content-range")
"""Headers that make a body something else than the file."""

_log = structlog.get_logger()


class FilesRoute(BaseRoute):
    """Answers GET and HEAD with a file, or a folder as an archive, and takes either with PUT."""

    def __init__(self, pool: DescriptorPool, upstream: Upstream, closing: Closing) -> None:
        self.methods = set(_PARAMETERS)
        self._pool = pool
        self._upstream = upstream
        self._closing = closing

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether this route is for the request: PARTIAL where only the method differs."""
        return matched(TEMPLATE, self.methods, scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Makes the call and sends what comes of it."""
        if scope["method"] not in self.methods:
            raise HTTPException(405)
        request, body = Request(scope, receive), _Body(send)
        try:
            if scope["method"] == "PUT":
                await self._take(request, send)
            else:
                await self._give(request, body)
        except ClientDisconnect:
            return
        except Exception as error:
            status = self._upstream.status(error, f"{scope['method']} of files")
            if not body.is_started:
                await error_response(status)(scope, receive, send)
                return
            # The server breaks off an answer that has no end, which is all that HTTP has for this.
            _log.warning("a file's answer ends in the middle", path=scope["path"], why=status.message)

    async def _give(self, request: Request, body: _Body) -> None:
        values = _parameters(request)
        asked = ReadFileRequest(name=_name(request), path=values["path"], archive="archive" in values)
        asked.describe_only = request.method == "HEAD"
        await read_body(request, 0)
        call = self._upstream.files.ReadFile(asked, timeout=grpc_timeout_s(request.headers))
        try:
            async with disconnection(request.receive) as gone:
                await _send_file(streams.messages(call, gone, self._closing.streams), asked, body)
        finally:
            call.cancel()

    async def _take(self, request: Request, send: Send) -> None:
        header = _header(request)
        call = self._upstream.files.WriteFile(timeout=grpc_timeout_s(request.headers))
        try:
            await call.write(WriteFileRequest(header=header))
            # Most of what can go wrong goes wrong here, before the client is asked for its bytes.
            if READY not in tuple(await call.initial_metadata()):
                await call  # raises why
            await self._send_body(request, call)
            async with disconnection(request.receive) as gone:
                answer = await answer_of(call, gone, self._closing)
        finally:
            call.cancel()
        response = Response(proto_json.to_json(answer, self._pool), media_type="application/json")
        await response(request.scope, request.receive, send)

    async def _send_body(self, request: Request, call: Any) -> None:
        try:
            async with contextlib.aclosing(_chunks(request, call)) as chunks:
                async for chunk in chunks:
                    await call.write(WriteFileRequest(data=chunk))
            await call.write(WriteFileRequest(end=True))
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError) as error:
            # The call is over, and as a rule tells why. Not always: gRPC may put the failed write in its place.
            if await call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL):
                why = "the copy was ended before all of it had come; the guest may be out of room"
                raise Aborted(why, reason="COPY_UNFINISHED") from error


async def _chunks(request: Request, call: Any) -> AsyncGenerator[bytes]:
    """The chunks of a body, for as long as its call goes on.

    Raises:
        ClientDisconnect: the client went away.
        DeadlineExceeded: nothing came for `BODY_IDLE_TIMEOUT_S`.
        asyncio.InvalidStateError: the call is over.
    """
    chunks = aiter(request.stream())
    over = asyncio.ensure_future(call.code())
    reading = asyncio.ensure_future(anext(chunks, None))
    try:
        while True:
            done, _ = await asyncio.wait(
                {reading, over}, timeout=BODY_IDLE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if over in done:
                raise asyncio.InvalidStateError("the call is over")
            if not done:
                why = f"the body ceased: nothing came for {BODY_IDLE_TIMEOUT_S:g} s; nothing was written"
                raise DeadlineExceeded(why, reason="BODY_TOO_SLOW")
            chunk = reading.result()
            if chunk is None:
                return
            if chunk:
                yield chunk
            reading = asyncio.ensure_future(anext(chunks, None))
    finally:
        over.cancel()
        reading.cancel()
        await asyncio.gather(over, reading, return_exceptions=True)


class _Body:
    """A body that is sent as it comes; its last piece ends it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False

    async def start(self, headers: Mapping[str, str]) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        self.is_started = True

    async def write(self, data: bytes, *, is_last: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


async def _send_file(parts: AsyncGenerator[Any], asked: ReadFileRequest, body: _Body) -> None:
    """Sends a file as it comes, its last piece after its digest."""
    held_back = b""
    async with contextlib.aclosing(parts):
        async for part in parts:
            match part and part.WhichOneof("part"):
                case "description":
                    await body.start(_headers(part.description, asked))
                    if asked.describe_only:
                        await body.write(b"", is_last=True)
                case "data":
                    if held_back:
                        await body.write(held_back, is_last=False)
                    held_back = part.data
                case "digest":
                    await body.write(held_back, is_last=True)


def _headers(file: FileDescription, asked: ReadFileRequest) -> dict[str, str]:
    if file.is_folder is not asked.archive:
        why = "not a folder" if asked.archive else "it is a folder, which comes with archive=tar"
        raise FailedPrecondition(f"{asked.path}: {why}", reason="GUEST_FILE_UNSUITABLE", metadata={"name": asked.name})
    name = posixpath.basename(asked.path.rstrip("/")) or asked.name
    headers = {
        "content-type": "application/x-tar" if file.is_folder else "application/octet-stream",
        "content-disposition": content_disposition(f"{name}.tar" if file.is_folder else name),
        "x-content-type-options": "nosniff",  # what a guest has in its files is not for a browser to run
        "cache-control": "no-store",
        "accept-ranges": "none",
    }
    if file.HasField("size_bytes"):
        headers["content-length"] = str(file.size_bytes)
    if file.HasField("modify_time"):
        with contextlib.suppress(ValueError, OverflowError):  # a year that HTTP cannot write
            headers["last-modified"] = formatdate(file.modify_time.seconds, usegmt=True)
    if file.HasField("mode"):
        headers["vmherd-mode"] = f"{file.mode:04o}"
    if file.notice:
        headers["vmherd-notice"] = _ascii(file.notice)
    return headers


def content_disposition(name: str) -> str:
    """The header that makes a browser store a file under this name: RFC 6266, with RFC 5987 where ASCII is no help."""
    plain = re.sub(r'["\\%]', "_", _ascii(name))
    extended = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    return f'attachment; filename="{plain}"{extended}'


def _ascii(text: str) -> str:
    return re.sub("[^ -~]", "_", text)


def _name(request: Request) -> str:
    [variable], [raw] = TEMPLATE.variables, request.scope["captured"]
    try:
        return variable.decode(raw)
    except UnicodeDecodeError as error:
        raise InvalidArgument.of([FieldViolation("name", "it is not UTF-8")]) from error


def _parameters(request: Request) -> dict[str, str]:
    """The query: `path`, and what else the method takes, each at most once."""
    known = _PARAMETERS[request.method]
    values: dict[str, str] = {}
    for name, value in pairs(request.scope["query_string"]):
        if name not in known:
            why = f"there is no such query parameter; {request.method} has {', '.join(known)}"
            raise InvalidArgument.of([FieldViolation(name[: proto_json.SHOWN_CHARACTERS], why)])
        if name in values:
            raise InvalidArgument.of([FieldViolation(name, "it is given more than once")])
        values[name] = value
    if "path" not in values:
        raise InvalidArgument.of([FieldViolation("path", "is missing: which file, as in ?path=/etc/hosts")])
    if values.get("archive", "tar") != "tar":
        raise InvalidArgument.of([FieldViolation("archive", "takes tar")])
    if not _OCTAL.fullmatch(values.get("mode", "0")):
        raise InvalidArgument.of([FieldViolation("mode", "must be octal, as in 0644")])
    return values


def _header(request: Request) -> WriteFileHeader:
    values = _parameters(request)
    for name in _PARTIAL:
        if name in request.headers:
            raise InvalidArgument(f"the header {name} is not understood: the body is the file", reason="BODY_NOT_PLAIN")
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise InvalidArgument(
            "the body is a form; it has to be the plain file, as `curl --upload-file` sends it",
            reason="MEDIA_TYPE_NOT_SUPPORTED",
        )
    header = WriteFileHeader(name=_name(request), path=values["path"], archive="archive" in values)
    if "mode" in values:
        header.mode = int(values["mode"], 8)
    if "content-length" in request.headers:
        declared_bytes = int(request.headers["content-length"])
        if declared_bytes > SIZE_MAX_BYTES:
            raise InvalidArgument(f"the body is larger than {SIZE_MAX_BYTES} bytes", reason="BODY_TOO_LARGE")
        header.size_bytes = declared_bytes
    return header
