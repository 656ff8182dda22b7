"""Server streams over HTTP, from the first message to the last, whoever ends them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.integration.gateway import raw
from tests.integration.gateway.conftest import DEADLINE_S
from tests.integration.gateway.peer import Peer
from vmherd.api.v1.controller_pb2 import WatchRequest, WatchResponse
from vmherd.api.v1.instance_pb2 import Instance
from vmherd.gateway import streams
from vmherd.model.errors import OutOfRange, instance_not_found

pytestmark = pytest.mark.anyio

FIRST = WatchResponse(kind=WatchResponse.CURRENT, revision=1, instance=Instance(name="ä\n"))
SECOND = WatchResponse(kind=WatchResponse.SYNCED, revision=2**60)
EVENTS = {"Accept": "text/event-stream"}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream as a browser would see them: each with its type and the JSON of its data."""
    events = []
    for block in text.split("\n\n"):
        fields = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        if fields:
            named = {name: value for name, _, value in fields}
            events.append({"event": named.get("event", "message"), "data": json.loads(named["data"])})
    return events


async def test_lines(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Watch"] = peer.streaming(FIRST, SECOND)
    response = await http.get("/v1/watch?fromRevision=7&name=web")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson")
    assert peer.requests == [WatchRequest(from_revision=7, name="web")]
    first, second = (json.loads(line) for line in response.text.splitlines())
    assert first["result"]["instance"]["name"] == "ä\n"
    assert second == {"result": {"kind": "SYNCED", "revision": str(2**60)}}


@pytest.mark.parametrize("accept", ["text/event-stream", "text/html, Text/Event-Stream;q=0.9"])
async def test_events(http: httpx.AsyncClient, peer: Peer, accept: str) -> None:
    peer.answers["Watch"] = peer.streaming(FIRST, SECOND)
    response = await http.get("/v1/watch", headers={"Accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    first, second = events_of(response.text)
    assert (first["event"], first["data"]["instance"]["name"]) == ("message", "ä\n")
    assert second == {"event": "message", "data": {"kind": "SYNCED", "revision": str(2**60)}}


@pytest.mark.parametrize("headers", [{}, EVENTS])
async def test_a_stream_without_a_message(http: httpx.AsyncClient, peer: Peer, headers: dict[str, str]) -> None:
    peer.answers["Watch"] = peer.streaming()
    response = await http.get("/v1/watch", headers=headers)
    assert (response.status_code, response.text) == (200, "")


@pytest.mark.parametrize("headers", [{}, EVENTS])
async def test_an_error_before_the_first_message(http: httpx.AsyncClient, peer: Peer, headers: dict[str, str]) -> None:
    peer.answers["Wait"] = peer.streaming(then=instance_not_found("web"))
    response = await http.get("/v1/instances/web/wait?until=ADDRESS&timeout=3s", headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (404, "application/json")
    assert response.json()["details"][0]["reason"] == "INSTANCE_NOT_FOUND"


async def test_an_error_in_the_middle_is_the_last_line(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Watch"] = peer.streaming(FIRST, then=OutOfRange("compacted", metadata={"oldest": 5}))
    response = await http.get("/v1/watch")
    assert response.status_code == 200
    first, last = (json.loads(line) for line in response.text.splitlines())
    assert set(first) == {"result"}
    assert (last["error"]["code"], last["error"]["message"]) == (11, "compacted")
    assert last["error"]["details"][0]["metadata"] == {"oldest": "5"}


async def test_an_error_in_the_middle_is_the_last_event(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Watch"] = peer.streaming(FIRST, then=OutOfRange("compacted"))
    first, last = events_of((await http.get("/v1/watch", headers=EVENTS)).text)
    assert first["event"] == "message"
    assert (last["event"], last["data"]["code"]) == ("error", 11)


async def test_a_message_that_is_no_json_ends_the_stream_without_its_text(http: httpx.AsyncClient, peer: Peer) -> None:
    broken = WatchResponse(instance=Instance(name="web"))
    broken.instance.create_time.seconds = 2**62
    peer.answers["Watch"] = peer.streaming(FIRST, broken)
    last = json.loads((await http.get("/v1/watch")).text.splitlines()[-1])
    assert last["error"]["message"].startswith("internal error; the log has the details under incident id ")


async def test_messages_come_as_they_are_sent(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Watch"] = peer.streaming(FIRST, hang=True)
    async with asyncio.timeout(DEADLINE_S), http.stream("GET", "/v1/watch") as response:
        line = await anext(response.aiter_lines())
        assert json.loads(line)["result"]["revision"] == "1"


@pytest.mark.parametrize("headers", [{}, EVENTS])
@pytest.mark.parametrize("messages", [(), (FIRST,)])
async def test_a_client_that_goes_away_cancels_the_call(
    gateway: str, peer: Peer, headers: dict[str, str], messages: tuple[WatchResponse, ...]
) -> None:
    peer.answers["Watch"] = peer.streaming(*messages, hang=True)
    async with asyncio.timeout(DEADLINE_S):
        async with raw.connected(gateway) as (_, writer):
            writer.write(raw.head("GET", "/v1/watch", gateway, **headers))
            await peer.began.wait()
        await peer.was_cancelled.wait()


async def test_a_timeout_ends_a_stream(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Watch"] = peer.streaming(FIRST, hang=True)
    async with asyncio.timeout(DEADLINE_S):
        response = await http.get("/v1/watch", headers={"Grpc-Timeout": "2S"})
        last = json.loads(response.text.splitlines()[-1])
        assert last["error"]["details"][0]["reason"] == "GRPC_TIMEOUT"
        await peer.was_cancelled.wait()


async def test_silence_is_broken_by_heartbeats(
    http: httpx.AsyncClient, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.02)
    peer.answers["Watch"] = peer.streaming(hang=True)
    async with asyncio.timeout(DEADLINE_S):
        async with http.stream("GET", "/v1/watch", headers=EVENTS) as response:
            assert response.status_code == 200
            text = ""
            async for chunk in response.aiter_text():
                text += chunk
                if len(text) >= 3 * len(": \n\n"):
                    break
        assert text.startswith(": \n\n: \n\n: \n\n")
        async with http.stream("GET", "/v1/watch") as response:
            assert response.status_code == 200  # the head alone: lines have no heartbeat that every reader would skip


async def test_a_message_after_a_heartbeat_is_not_lost(
    http: httpx.AsyncClient, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.02)
    go_on = asyncio.Event()

    async def answer(_request: Any, _context: Any) -> Any:
        await go_on.wait()
        yield FIRST
        yield SECOND

    peer.answers["Watch"] = answer
    async with asyncio.timeout(DEADLINE_S), http.stream("GET", "/v1/watch", headers=EVENTS) as response:
        text = ""
        async for chunk in response.aiter_text():
            text += chunk
            go_on.set()
    assert [event["data"]["revision"] for event in events_of(text)] == ["1", str(2**60)]
