"""FileService: files and folders of a guest."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

from google.protobuf.timestamp_pb2 import Timestamp

from vmherd.api.v1 import file_pb2, file_pb2_grpc
from vmherd.controller.agent_calls import Context, next_request, time_left_s, to_vmherd_error
from vmherd.controller.herd import Herd
from vmherd.guest_agent import AgentError, GuestAgent, files
from vmherd.model.errors import DeadlineExceeded, FieldViolation, InvalidArgument
from vmherd.rpc.channel import READY

CALLER_TIMEOUT_S = 600.0
"""How long a caller that writes may send nothing: what makes its bytes may need a while."""

TIDY_UP_S = 2.0
"""How much of a caller's time is kept for tidying up, so that the caller still hears what went wrong."""

PATH_MAX_BYTES = 4096
MODE_MAX = 0o7777


class FileServicer(file_pb2_grpc.FileServiceServicer):
    """See protos/vmherd/api/v1/file.proto."""

    def __init__(self, herd: Herd) -> None:
        self._herd = herd

    async def ReadFile(
        self, request: file_pb2.ReadFileRequest, context: Context
    ) -> AsyncIterator[file_pb2.ReadFileResponse]:
        _check(request)
        async with _copying(request.name, context):
            agent = self._agent(request)
            if request.describe_only:
                yield _described(await files.describe(agent, request.path))
                return
            async with files.open_reader(agent, request.path, archive=request.archive) as reader:
                yield _described(reader.description)
                async with contextlib.aclosing(aiter(reader)) as chunks:
                    async for chunk in chunks:
                        yield file_pb2.ReadFileResponse(data=chunk)
                yield file_pb2.ReadFileResponse(digest=_digest(await reader.finish()))

    async def WriteFile(
        self, request_iterator: AsyncIterator[file_pb2.WriteFileRequest], context: Context
    ) -> file_pb2.WriteFileResponse:
        header = await _header(request_iterator)
        async with (
            _copying(header.name, context),
            files.open_writer(
                self._agent(header),
                header.path,
                mode=header.mode if header.HasField("mode") else None,
                archive=header.archive,
                size_bytes=header.size_bytes if header.HasField("size_bytes") else None,
            ) as writer,
        ):
            await context.send_initial_metadata((READY,))
            async for data in _data(request_iterator):
                await writer.write(data)
            return file_pb2.WriteFileResponse(path=header.path, digest=_digest(await writer.finish()))

    def _agent(self, request: file_pb2.ReadFileRequest | file_pb2.WriteFileHeader) -> GuestAgent:
        return self._herd.find(request.name).open_agent()


@contextlib.asynccontextmanager
async def _copying(name: str, context: Context) -> AsyncIterator[None]:
    """Ends a copy a little before the caller's deadline, and gives the agent's errors as vmherd's."""
    left_s = time_left_s(context, math.inf, tidy_up_s=TIDY_UP_S)
    try:
        async with asyncio.timeout(None if left_s == math.inf else left_s):
            yield
    except TimeoutError as error:
        why = f"{name!r}: time was up before the copy was complete; a call without a deadline may take any time"
        raise DeadlineExceeded(why, reason="COPY_UNFINISHED", metadata={"name": name}) from error
    except AgentError as error:
        raise to_vmherd_error(error, name) from error


async def _header(requests: AsyncIterator[file_pb2.WriteFileRequest]) -> file_pb2.WriteFileHeader:
    first = await next_request(requests, timeout_s=CALLER_TIMEOUT_S)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidArgument.of([FieldViolation("header", "must come first")])
    _check(first.header)
    return first.header


async def _data(requests: AsyncIterator[file_pb2.WriteFileRequest]) -> AsyncIterator[bytes]:
    """The bytes that come after the header, up to the end that has to come."""
    while (part := await next_request(requests, timeout_s=CALLER_TIMEOUT_S)) and not part.end:
        if part.WhichOneof("part") != "data":
            raise InvalidArgument("after the header come bytes, and at last the end", reason="OUT_OF_ORDER")
        yield part.data
    if part is None:
        raise InvalidArgument("the requests ceased without `end`; nothing was written", reason="END_MISSING")


def _check(request: file_pb2.ReadFileRequest | file_pb2.WriteFileHeader) -> None:
    violations = []
    path = request.path
    is_absolute = path.startswith("/") or path[1:3] in (":\\", ":/")
    if not is_absolute or "\0" in path or len(path.encode()) > PATH_MAX_BYTES:
        why = f"must be an absolute path in the guest, without NUL and of at most {PATH_MAX_BYTES} bytes"
        violations.append(FieldViolation("path", why))
    if isinstance(request, file_pb2.WriteFileHeader):
        if request.mode > MODE_MAX:
            violations.append(FieldViolation("mode", f"must be at most {MODE_MAX:#o}"))
        if request.size_bytes < 0:
            violations.append(FieldViolation("size_bytes", "must not be negative"))
    if violations:
        raise InvalidArgument.of(violations)


def _described(description: files.FileDescription) -> file_pb2.ReadFileResponse:
    modified_s = description.modified_s
    return file_pb2.ReadFileResponse(
        description=file_pb2.FileDescription(
            path=description.path,
            is_folder=description.is_folder,
            size_bytes=description.size_bytes,
            mode=description.mode,
            modify_time=None if modified_s is None else Timestamp(seconds=modified_s),
            notice=description.notice,
        )
    )


def _digest(digest: files.FileDigest) -> file_pb2.FileDigest:
    return file_pb2.FileDigest(
        size_bytes=digest.size_bytes, sha256=digest.sha256, verified=digest.verified, notice=digest.notice
    )
