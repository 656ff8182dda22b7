"""How much of a request's body is read."""

from __future__ import annotations

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from vmherd.gateway.routes import read_body
from vmherd.model.errors import InvalidArgument

pytestmark = pytest.mark.anyio


class Sender:
    """A client that sends the same chunk again and again, and counts how often it was asked for one."""

    def __init__(self, chunk: bytes, *, times: int) -> None:
        self._chunk = chunk
        self._times = times
        self.asked = 0

    async def receive(self) -> Message:
        self.asked += 1
        return {"type": "http.request", "body": self._chunk, "more_body": self.asked < self._times}


def request(sender: Sender, **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw}, sender.receive)


async def test_chunks_are_put_together() -> None:
    sender = Sender(b"ab", times=3)
    asked = request(sender, transfer_encoding="chunked", content_type="application/json")
    assert await read_body(asked, 6) == b"ababab"


async def test_no_more_is_read_than_is_allowed() -> None:
    sender = Sender(b"x" * 1024, times=100_000)
    with pytest.raises(InvalidArgument, match="larger than 4096 bytes"):
        await read_body(request(sender, transfer_encoding="chunked", content_type="application/json"), 4096)
    assert sender.asked == 5


@pytest.mark.parametrize(
    "headers",
    [
        {"content_length": "5000", "content_type": "application/json"},
        {"content_length": "5", "content_type": "text/css"},
    ],
)
async def test_nothing_is_read_of_what_its_head_rules_out(headers: dict[str, str]) -> None:
    sender = Sender(b"", times=1)
    with pytest.raises(InvalidArgument):
        await read_body(request(sender, **headers), 4096)
    assert sender.asked == 0


async def test_a_client_that_leaves() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await read_body(Request({"type": "http", "headers": []}, receive), 10)
