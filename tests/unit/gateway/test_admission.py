"""Who gets past the front door."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from vmherd.gateway.admission import Admission

pytestmark = pytest.mark.anyio

TOKEN = "sesame"


async def ask(headers: dict[str, str], path: str = "/v1/instances", token: str | None = TOKEN) -> tuple[int, str]:
    """The HTTP code of what Admission answers and its reason; 200 and nothing where it lets the request through."""
    sent: list[Any] = []

    async def inside(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        raise AssertionError("it looks at headers alone")

    async def send(message: Message) -> None:
        sent.append(message)

    door = Admission(
        inside, hosts=["vm.example.org:8080", "Box.Local", "[fd00::1]:80", "", "[bad"], token=token, public=["/healthz"]
    )
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await door({"type": "http", "raw_path": path.encode(), "path": path, "headers": raw}, receive, send)
    body = sent[1]["body"]
    return sent[0]["status"], json.loads(body)["details"][0]["reason"] if body else ""


BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8080", "LOCALHOST.", "127.0.0.1:1", "127.9.9.9", "[::1]:8080", "[::1]"),
        *("vm.example.org", "VM.example.org:9", "box.local", "[fd00::1]:80"),
    ],
)
async def test_hosts_of_the_gateway(host: str) -> None:
    assert await ask(BEARER | {"Host": host}) == (200, "")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "",
        "[::1",
        "[]",
        "a b",
        "\xff",
        ":80",
    ],
)
async def test_other_hosts(host: str) -> None:
    assert await ask(BEARER | {"Host": host}) == (403, "HOST_NOT_ALLOWED")
    assert await ask({"Host": host}, "/healthz", token=None) == (403, "HOST_NOT_ALLOWED")


async def test_no_host_at_all() -> None:
    assert await ask(BEARER) == (403, "HOST_NOT_ALLOWED")


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [
        ("http://localhost:8080", True),
        ("https://LOCALHOST:8080", True),
        ("http://localhost", False),
        ("http://localhost:3000", False),
        ("http://evil.example", False),
        ("http://evil.example/localhost:8080", False),
        ("http://localhost:8080.evil.example", False),
        ("null", False),
        ("", False),
    ],
)
async def test_origins(origin: str, is_let_in: bool) -> None:
    expected = (200, "") if is_let_in else (403, "ORIGIN_NOT_ALLOWED")
    assert await ask(BEARER | {"Host": "localhost:8080", "Origin": origin}) == expected


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer sesame2",
        "Basic sesame",
        "sesame",
        "Bearer sésame",
        "Bearer \xff",
    ],
)
async def test_wrong_tokens(given: str | None) -> None:
    headers = {"Host": "localhost"} | ({} if given is None else {"Authorization": given})
    assert await ask(headers) == (401, "TOKEN_NEEDED")


@pytest.mark.parametrize("given", ["Bearer sesame", "bearer sesame", "BEARER  sesame "])
async def test_the_right_token(given: str) -> None:
    assert await ask({"Host": "localhost", "Authorization": given}) == (200, "")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/healthz", 200),
        ("/healthz/", 401),
        ("/%68ealthz", 401),
        ("//healthz", 401),
        ("/v1/../healthz", 401),
        ("/", 401),
    ],
)
async def test_only_public_paths_need_no_token(path: str, code: int) -> None:
    assert (await ask({"Host": "localhost"}, path))[0] == code


async def test_without_a_token_everybody_is_let_in() -> None:
    assert await ask({"Host": "localhost"}, token=None) == (200, "")
