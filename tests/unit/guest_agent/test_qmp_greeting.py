"""A monitor's socket is told from an agent's at once, not when time is up."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from vmherd.guest_agent import GuestAgent, ProtocolError

pytestmark = pytest.mark.anyio


async def test_a_monitor_is_no_agent(path: Path) -> None:
    left = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        left.set()

    async with await asyncio.start_unix_server(greet, path):
        async with GuestAgent(path) as agent:
            with pytest.raises(ProtocolError, match="QMP") as caught:
                await agent.ping(timeout_s=60)
        await left.wait()
    assert not caught.value.outcome_unknown
