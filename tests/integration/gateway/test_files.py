"""Files over HTTP: the real gateway, and a controller whose files a test writes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.integration.gateway.conftest import DEADLINE_S
from vmherd.api.settings.v1.settings_pb2 import GatewaySettings
from vmherd.api.v1.file_pb2 import (
    FileDescription,
    FileDigest,
    ReadFileRequest,
    ReadFileResponse,
    WriteFileHeader,
    WriteFileResponse,
)
from vmherd.api.v1.file_pb2_grpc import FileServiceServicer, add_FileServiceServicer_to_server
from vmherd.gateway.app import serving as gateway_serving
from vmherd.gateway.files import content_disposition
from vmherd.model.errors import Aborted, DeadlineExceeded, NotFound, ResourceExhausted
from vmherd.rpc.channel import READY
from vmherd.rpc.serving import serving as rpc_serving

pytestmark = pytest.mark.anyio

FILES = "/v1/instances/web/files"
PIECE = bytes(range(256)) * 1024


class Guest(FileServiceServicer):
    """One file, and what was asked and written."""

    def __init__(self) -> None:
        self.description = FileDescription(path="/f")
        self.pieces: list[bytes] = [b"data"]
        self.failure: Exception | None = None
        self.fails_after = 0
        """How many pieces come, or are taken, before the failure."""
        self.sends_on = False
        """Whether the last piece comes again and again."""
        self.requests: list[Any] = []
        self.moved = 0
        self.was_cancelled = asyncio.Event()
        self.began = asyncio.Event()
        self.moved_on = asyncio.Event()

    async def ReadFile(  # noqa: N802
        self, request: ReadFileRequest, context: Any
    ) -> AsyncIterator[ReadFileResponse]:
        self.requests.append(request)
        try:
            if self.failure and not self.fails_after:
                raise self.failure
            yield ReadFileResponse(description=self.description)
            if request.describe_only:
                return
            while self.moved < len(self.pieces) or self.sends_on:
                yield ReadFileResponse(data=self.pieces[min(self.moved, len(self.pieces) - 1)])
                self.moved += 1
                self.began.set()
                if self.failure and self.moved == self.fails_after:
                    raise self.failure
            yield ReadFileResponse(digest=FileDigest(verified=True))
        except (asyncio.CancelledError, GeneratorExit):
            self.was_cancelled.set()
            raise

    async def WriteFile(self, request_iterator: Any, context: Any) -> WriteFileResponse:  # noqa: N802
        written = hashlib.sha256()
        try:
            async for request in request_iterator:
                if not self.requests:
                    self.requests.append(request.header)
                    self.began.set()
                if self.failure and self.moved == self.fails_after:
                    raise self.failure
                if not self.moved:
                    await context.send_initial_metadata((READY,))
                if request.end:
                    digest = FileDigest(sha256=written.hexdigest(), verified=True)
                    return WriteFileResponse(path="/f", digest=digest)
                self.moved += 1
                self.moved_on.set()
                written.update(request.data)
            self.was_cancelled.set()  # gRPC tells it in either of two ways
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        return WriteFileResponse()


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
async def gateway(guest: Guest, short_dir: Path) -> AsyncIterator[str]:
    services = {
        "vmherd.api.v1.FileService": lambda server: add_FileServiceServicer_to_server(guest, server),
    }
    settings = GatewaySettings(listen="127.0.0.1:0", controller=str(short_dir / "c.sock"), no_token=True)
    async with rpc_serving(services, short_dir / "c.sock"), gateway_serving(settings) as address:
        yield address


@pytest.fixture
async def http(gateway: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{gateway}", timeout=DEADLINE_S, trust_env=False) as client:
        yield client


def reason(answer: httpx.Response) -> str:
    return str(answer.json()["details"][0]["reason"])


async def test_a_file_comes_with_all_that_is_known_of_it(http: httpx.AsyncClient, guest: Guest) -> None:
    guest.description = FileDescription(
        path="/f", size_bytes=4, mode=0o644, modify_time=Timestamp(seconds=86400), notice="not verified\r\nX-Evil: 1"
    )
    answer = await http.get(FILES, params={"path": "/etc/page.html"})
    assert (answer.status_code, answer.content) == (200, b"data")
    head = await http.head(FILES, params={"path": "/etc/page.html"})
    for headers in (answer.headers, head.headers):
        assert {name: value for name, value in headers.items() if name != "date"} == {
            "content-type": "application/octet-stream",
            "content-length": "4",
            "content-disposition": 'attachment; filename="page.html"',
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
            "accept-ranges": "none",
            "last-modified": "Fri, 02 Jan 1970 00:00:00 GMT",
            "vmherd-mode": "0644",
            "vmherd-notice": "not verified__X-Evil: 1",
        }
    assert guest.requests == [
        ReadFileRequest(name="web", path="/etc/page.html"),
        ReadFileRequest(name="web", path="/etc/page.html", describe_only=True),
    ]


async def test_a_file_of_unknown_size(http: httpx.AsyncClient, guest: Guest) -> None:
    guest.pieces = [b"one", b"two", b"three"]
    answer = await http.get(FILES, params={"path": "/proc/f"})
    assert answer.content == b"onetwothree"
    assert "content-length" not in answer.headers
    guest.pieces, guest.moved = [], 0
    assert (await http.get(FILES, params={"path": "/proc/f"})).content == b""


async def test_a_folder_comes_as_an_archive(http: httpx.AsyncClient, guest: Guest) -> None:
    guest.description.is_folder = True
    answer = await http.get(FILES, params={"path": "/etc/", "archive": "tar"})
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-disposition"] == 'attachment; filename="etc.tar"'
    assert (await http.get(FILES, params={"path": "/", "archive": "tar"})).headers["content-disposition"] == (
        'attachment; filename="web.tar"'
    )
    for method in ("GET", "HEAD"):
        assert (await http.request(method, FILES, params={"path": "/etc"})).status_code == 400


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("plain.txt", 'attachment; filename="plain.txt"'),
        ("with space", 'attachment; filename="with space"'),
        ('a"b\\c%41', "attachment; filename=\"a_b_c_41\"; filename*=UTF-8''a%22b%5Cc%2541"),
        ("naïve €", "attachment; filename=\"na_ve _\"; filename*=UTF-8''na%C3%AFve%20%E2%82%AC"),
        ("new\r\nline: x", "attachment; filename=\"new__line: x\"; filename*=UTF-8''new%0D%0Aline%3A%20x"),
    ],
)
def test_names_for_browsers(name: str, header: str) -> None:
    assert content_disposition(name) == header


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("", "path"),
        ("path=/f&path=/g", "more than once"),
        ("path=/f&archive=zip", "takes tar"),
        ("path=/f&mode=0644", "no such query parameter"),
        ("path=/f&other=1", "no such query parameter"),
        ("path=%ff", "UTF-8"),
    ],
)
async def test_a_query_that_is_wrong(http: httpx.AsyncClient, guest: Guest, query: str, why: str) -> None:
    answer = await http.get(f"{FILES}?{query}")
    assert answer.status_code == 400
    assert why in answer.text
    assert guest.requests == []


async def test_methods(http: httpx.AsyncClient) -> None:
    answer = await http.post(f"{FILES}?path=/f")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, PUT")


async def test_an_upload_of_any_type(http: httpx.AsyncClient, guest: Guest) -> None:
    content = PIECE * 20
    query = {"path": "/a b&c/ü", "mode": "0750"}
    answer = await http.put(FILES, params=query, content=content, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200
    assert answer.json()["digest"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert guest.requests == [WriteFileHeader(name="web", path="/a b&c/ü", mode=0o750, size_bytes=len(content))]


async def test_an_upload_of_unknown_size(http: httpx.AsyncClient, guest: Guest) -> None:
    async def content() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield PIECE

    answer = await http.put(FILES, params={"path": "/f", "archive": "tar"}, content=content())
    assert answer.json()["digest"]["sha256"] == hashlib.sha256(PIECE * 20).hexdigest()
    assert guest.requests == [WriteFileHeader(name="web", path="/f", archive=True)]


async def test_an_empty_upload(http: httpx.AsyncClient, guest: Guest) -> None:
    answer = await http.put(FILES, params={"path": "/f"}, content=b"")
    assert answer.json()["digest"]["sha256"] == hashlib.sha256(b"").hexdigest()
    assert guest.requests[0].size_bytes == 0


@pytest.mark.parametrize("header", ["Content-Encoding", "Content-Range"])
async def test_a_body_that_is_not_the_file(http: httpx.AsyncClient, guest: Guest, header: str) -> None:
    answer = await http.put(FILES, params={"path": "/f"}, content=b"x", headers={header: "x"})
    assert (answer.status_code, reason(answer)) == (400, "BODY_NOT_PLAIN")
    assert guest.requests == []


async def test_a_form_is_not_the_file(http: httpx.AsyncClient, guest: Guest) -> None:
    answer = await http.put(FILES, params={"path": "/f"}, files={"file": b"x"})
    assert (answer.status_code, reason(answer)) == (415, "MEDIA_TYPE_NOT_SUPPORTED")
    assert guest.requests == []


@pytest.mark.parametrize("mode", ["", "8", "0o644", "-1", "12345", "u+x"])
async def test_a_mode_that_is_none(http: httpx.AsyncClient, mode: str) -> None:
    answer = await http.put(FILES, params={"path": "/f", "mode": mode}, content=b"x")
    assert answer.status_code == 400
    assert "octal" in answer.text


async def test_an_error_before_the_first_byte(http: httpx.AsyncClient, guest: Guest) -> None:
    guest.failure = NotFound("/f: No such file or directory", reason="GUEST_FILE_NOT_FOUND")
    for method in ("GET", "PUT"):
        answer = await http.request(method, FILES, params={"path": "/f"})
        assert (answer.status_code, reason(answer)) == (404, "GUEST_FILE_NOT_FOUND")
        assert "content-disposition" not in answer.headers


@pytest.mark.parametrize("size_bytes", [None, 3 * len(PIECE)])
async def test_no_client_takes_a_part_for_the_whole(
    http: httpx.AsyncClient, guest: Guest, size_bytes: int | None
) -> None:
    """Even where every byte was read, and is found to be wrong after that."""
    guest.description = FileDescription(path="/f", size_bytes=size_bytes)
    guest.pieces, guest.failure, guest.fails_after = [PIECE] * 3, Aborted("it changed while it was read"), 3
    with pytest.raises(httpx.RemoteProtocolError):
        await http.get(FILES, params={"path": "/f"})


async def test_an_upload_that_fails_in_the_middle(http: httpx.AsyncClient, guest: Guest) -> None:
    guest.failure, guest.fails_after = ResourceExhausted("no space", reason="GUEST_FULL"), 3
    answer = await http.put(FILES, params={"path": "/f"}, content=PIECE * 40)
    # gRPC may lose the reason where it fails a write at the same moment.
    assert (answer.status_code, reason(answer)) in {(429, "GUEST_FULL"), (409, "COPY_UNFINISHED")}


async def test_an_upload_that_is_refused_is_not_asked_for(gateway: str, guest: Guest) -> None:
    guest.failure = NotFound("/none/f: No such file or directory", reason="GUEST_FILE_NOT_FOUND")
    host, port = gateway.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"PUT {FILES}?path=/none/f HTTP/1.1\r\nHost: {gateway}\r\nContent-Length: 100\r\nExpect: 100-continue\r\n"
    writer.write(f"{head}\r\n".encode())
    assert await asyncio.wait_for(reader.readline(), DEADLINE_S) == b"HTTP/1.1 404 Not Found\r\n"
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(("size", "code"), [(1 << 63, 413), (10**19 - 1, 413), (10**4000, 400)])
async def test_a_body_larger_than_any_file(gateway: str, guest: Guest, size: int, code: int) -> None:
    async with raw_request(gateway, f"Content-Length: {size}") as (reader, _):
        head = await asyncio.wait_for(reader.readline(), DEADLINE_S)
    assert head.split()[1] == str(code).encode()
    assert guest.requests == []


async def test_an_upload_that_stalls_ends_with_its_call(gateway: str, guest: Guest) -> None:
    guest.failure, guest.fails_after = DeadlineExceeded("nothing came", reason="CALLER_SILENT"), 1
    async with raw_request(gateway, "Content-Length: 100") as (reader, writer):
        await asyncio.wait_for(guest.began.wait(), DEADLINE_S)
        writer.write(b"ha")
        await asyncio.wait_for(guest.moved_on.wait(), DEADLINE_S)
        writer.write(b"lf")
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
    assert answer.startswith((b"HTTP/1.1 504 ", b"HTTP/1.1 409 ")), answer


async def test_an_upload_that_stalls_for_too_long(gateway: str, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmherd.gateway.files.BODY_IDLE_TIMEOUT_S", 0.1)
    async with raw_request(gateway, "Content-Length: 100") as (reader, writer):
        writer.write(b"half")
        head = await asyncio.wait_for(reader.readline(), DEADLINE_S)
        assert head.startswith(b"HTTP/1.1 408 ")
        await asyncio.wait_for(reader.readuntil(b"BODY_TOO_SLOW"), DEADLINE_S)
    await asyncio.wait_for(guest.was_cancelled.wait(), DEADLINE_S)


@contextlib.asynccontextmanager
async def raw_request(gateway: str, header: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A PUT whose body a test sends as it likes."""
    host, port = gateway.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"PUT {FILES}?path=/f HTTP/1.1\r\nHost: {gateway}\r\n{header}\r\n\r\n".encode())
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):  # the gateway leaves a body that it does not want unread
            await writer.wait_closed()


async def test_a_download_whose_client_leaves(http: httpx.AsyncClient, guest: Guest) -> None:
    guest.sends_on = True
    async with http.stream("GET", FILES, params={"path": "/f"}) as answer:
        assert answer.status_code == 200
        await guest.began.wait()
    await asyncio.wait_for(guest.was_cancelled.wait(), DEADLINE_S)


async def test_an_upload_whose_client_leaves(gateway: str, guest: Guest) -> None:
    host, port = gateway.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"PUT {FILES}?path=/f HTTP/1.1\r\nHost: {gateway}\r\nContent-Length: 100\r\n\r\nhalf".encode())
    await asyncio.wait_for(guest.began.wait(), DEADLINE_S)
    writer.close()
    await writer.wait_closed()
    await asyncio.wait_for(guest.was_cancelled.wait(), DEADLINE_S)


async def test_a_client_that_does_not_read_is_not_read_for(gateway: str, guest: Guest) -> None:
    """What lies between the guest and its reader is bounded by the sockets' buffers and gRPC's window."""
    guest.pieces, guest.sends_on = [PIECE], True
    host, port = gateway.split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # whatever size this host gives them
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    writer.write(f"GET {FILES}?path=/f HTTP/1.1\r\nHost: {gateway}\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    stalled = 0
    while stalled < 20:
        before = guest.moved
        await asyncio.sleep(0.02)
        stalled = stalled + 1 if guest.moved == before else 0
        assert guest.moved * len(PIECE) < 48 << 20
    writer.close()
    await writer.wait_closed()
    await asyncio.wait_for(guest.was_cancelled.wait(), DEADLINE_S)
