"""Requests that the gateway refuses by itself, over real HTTP; none of them reaches the controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import structlog.testing

from tests.integration.gateway import raw
from tests.integration.gateway.conftest import DEADLINE_S
from tests.integration.gateway.peer import Peer
from vmherd.api.settings.v1.settings_pb2 import GatewaySettings
from vmherd.api.v1.controller_pb2 import LaunchRequest
from vmherd.api.v1.instance_pb2 import Instance
from vmherd.gateway import routes
from vmherd.gateway.app import MAX_BODY_BYTES, serving

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
TOKEN = "correct-horse-battery-staple"


def reason_of(response: httpx.Response) -> str:
    """The reason of the one ErrorInfo that every error has."""
    reasons = [detail["reason"] for detail in response.json()["details"] if detail["@type"].endswith(".ErrorInfo")]
    assert len(reasons) == 1
    return str(reasons[0])


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "application/json5", "application/json; charset=latin-1"],
)
async def test_bodies_of_another_type(http: httpx.AsyncClient, peer: Peer, content_type: str) -> None:
    response = await http.post("/v1/instances", content=b"{}", headers={"Content-Type": content_type})
    assert (response.status_code, reason_of(response)) == (415, "MEDIA_TYPE_NOT_SUPPORTED")
    assert peer.requests == []


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
async def test_json_by_any_of_its_names(http: httpx.AsyncClient, peer: Peer, content_type: str) -> None:
    peer.answers["Launch"] = Instance()
    response = await http.post("/v1/instances", content=b'{"name":"a"}', headers={"Content-Type": content_type})
    assert response.status_code == 200


async def test_an_empty_body_is_an_empty_message(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Launch"] = Instance()
    assert (await http.post("/v1/instances")).status_code == 200
    assert (await http.post("/v1/instances", headers=JSON)).status_code == 200
    assert peer.requests == [LaunchRequest(), LaunchRequest()]


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "reason", "message"),
    [
        ("POST", "/v1/instances", b"{", 400, "MALFORMED_JSON", "at line 1, column 2"),
        ("POST", "/v1/instances", b"[1]", 400, "INVALID_ARGUMENT", "body: expected an object"),
        ("POST", "/v1/instances", b'{"nope": 1}', 400, "INVALID_ARGUMENT", "nope: there is no such field"),
        ("POST", "/v1/instances", b'{"hardware": {"cpus": -1}}', 400, "INVALID_ARGUMENT", "hardware.cpus: expected"),
        (
            "POST",
            "/v1/instances/a/stop",
            b'{"name": "b"}',
            400,
            "INVALID_ARGUMENT",
            'the path says "a" and the body "b"',
        ),
        ("POST", "/v1/instances/a/stop?force=true", b"{}", 400, "INVALID_ARGUMENT", "force: there is no such query"),
        ("DELETE", "/v1/instances/a", b"{}", 400, "BODY_NOT_ALLOWED", "takes no body"),
        ("GET", "/v1/instances?page=1", b"", 400, "INVALID_ARGUMENT", "page: there is no such query parameter"),
        ("GET", "/v1/instances/%ff", b"", 400, "INVALID_ARGUMENT", "name: it is not UTF-8"),
        ("GET", "/v1/instances?pageToken=%ff", b"", 400, "MALFORMED_QUERY", "not UTF-8"),
    ],
)
async def test_wrong_requests(
    http: httpx.AsyncClient, peer: Peer, method: str, path: str, body: bytes, code: int, reason: str, message: str
) -> None:
    response = await http.request(method, path, content=body or None, headers=JSON if body else None)
    assert (response.status_code, reason_of(response)) == (code, reason)
    assert message in response.json()["message"]
    assert peer.requests == []


async def test_a_wrong_field_is_named_by_its_path(http: httpx.AsyncClient, peer: Peer) -> None:
    response = await http.post("/v1/instances", json={"hardware": {"memoryMib": "much", "disks": 1}})
    details = {detail["@type"].rpartition(".")[2]: detail for detail in response.json()["details"]}
    fields = [it["field"] for it in details["BadRequest"]["fieldViolations"]]
    assert fields == ["hardware.memory_mib", "hardware.disks"]


async def test_a_body_of_the_largest_size_is_taken(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Launch"] = Instance()
    frame = len(b'{"image":""}')
    image = "x" * (MAX_BODY_BYTES - frame)
    body = b'{"image":"' + image.encode() + b'"}'
    assert (await http.post("/v1/instances", content=body, headers=JSON)).status_code == 200
    response = await http.post("/v1/instances", content=body + b" ", headers=JSON)
    assert (response.status_code, reason_of(response)) == (413, "BODY_TOO_LARGE")
    assert peer.requests == [LaunchRequest(image=image)]


async def test_a_body_that_says_it_is_too_large_is_not_waited_for(gateway: str) -> None:
    async with asyncio.timeout(DEADLINE_S), raw.connected(gateway) as (reader, writer):
        length = {"Content_Type": "application/json", "Content_Length": str(100 * 2**20)}
        writer.write(raw.head("POST", "/v1/instances", gateway, **length))
        code, value = await raw.answer(reader)
    assert (code, value["details"][0]["reason"]) == (413, "BODY_TOO_LARGE")


async def test_a_body_of_100_mb_without_a_length_is_cut(http: httpx.AsyncClient, peer: Peer) -> None:
    async def large() -> AsyncIterator[bytes]:
        for _ in range(1600):
            yield b" " * 65536

    response = await http.post("/v1/instances", content=large(), headers=JSON)
    assert (response.status_code, reason_of(response)) == (413, "BODY_TOO_LARGE")
    assert (await http.get("/healthz")).status_code == 200


async def test_a_body_that_never_comes(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "BODY_TIMEOUT_S", 0.05)
    async with asyncio.timeout(DEADLINE_S), raw.connected(gateway) as (reader, writer):
        head = raw.head("POST", "/v1/instances", gateway, Content_Type="application/json", Content_Length="10")
        writer.write(head + b'{"na')
        code, value = await raw.answer(reader)
    assert (code, value["details"][0]["reason"]) == (408, "BODY_TOO_SLOW")


async def test_a_client_that_leaves_in_the_middle_of_its_body(
    gateway: str, http: httpx.AsyncClient, peer: Peer
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        async with raw.connected(gateway) as (_, writer):
            head = raw.head("POST", "/v1/instances", gateway, Content_Type="application/json", Content_Length="10")
            writer.write(head + b'{"na')
            await writer.drain()
        assert (await http.get("/healthz")).status_code == 200
    assert peer.requests == []


async def test_hosts_and_origins(http: httpx.AsyncClient, gateway: str, peer: Peer) -> None:
    peer.answers["Info"] = Instance()
    ask = "/v1/instances/web"
    assert (await http.get(ask, headers={"Host": "localhost"})).status_code == 200
    assert (await http.get(ask, headers={"Origin": f"http://{gateway}"})).status_code == 200
    response = await http.get(ask, headers={"Host": "evil.example"})
    assert (response.status_code, reason_of(response)) == (403, "HOST_NOT_ALLOWED")
    response = await http.get(ask, headers={"Origin": "http://evil.example"})
    assert (response.status_code, reason_of(response)) == (403, "ORIGIN_NOT_ALLOWED")
    assert (await http.get("/healthz", headers={"Host": "evil.example"})).status_code == 403
    assert len(peer.requests) == 2


async def test_the_token(peer: Peer, shared_dir: Path, short_dir: Path) -> None:
    peer.answers["Info"] = Instance()
    token_file = short_dir / "token"
    token_file.write_text(f"{TOKEN}\n")
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        controller=str(shared_dir / "c.sock"),
        token_file=str(token_file),
        allowed_hosts=["vm.example.org"],
    )
    with structlog.testing.capture_logs() as logs:
        async with serving(settings) as address, httpx.AsyncClient(base_url=f"http://{address}") as http:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
                response = await http.get("/v1/instances/web", headers=headers)
                assert (response.status_code, reason_of(response)) == (401, "TOKEN_NEEDED")
                assert response.headers["www-authenticate"].startswith("Bearer ")
                assert (await http.get("/no/such/page", headers=headers)).status_code == 401
            http.headers["Authorization"] = f"Bearer {TOKEN}"
            assert (await http.get("/v1/instances/web")).status_code == 200
            assert (await http.get("/v1/instances/web", headers={"Host": "vm.example.org"})).status_code == 200
            del http.headers["Authorization"]
            for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/docs/swagger-ui.css"):
                assert (await http.get(path)).status_code == 200
    assert len(peer.requests) == 2
    assert logs
    assert TOKEN not in repr(logs)
