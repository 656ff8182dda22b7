"""What a client takes in memory, whatever the agent sends: measured in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.framework.fake_agent import FakeAgent, Request
from vmherd.guest_agent import AgentError, GuestAgent

pytestmark = pytest.mark.anyio

MIB = 1 << 20
MAX_GROWTH_MIB = 100
TIMEOUT_S = 60
PIECE_BYTES = MIB

FILE_READ = ("guest-file-read", {"handle": 1000, "count": 32 * MIB})
EXEC_STATUS = ("guest-exec-status", {"pid": 1})
OS_INFO = ("guest-get-osinfo", {})

Parts = tuple[tuple[bytes, int], ...]
"""What the agent sends, as pieces and how often each comes; ID stands for the request's id."""


def _reply(*parts: tuple[bytes, int]) -> Parts:
    return ((b'{"id": ID, "return": ', 1), *parts, (b"}\n", 1))


BASE64_32_MIB = (b"QUJD", 32 * MIB // 3)
BASE64_16_MIB = (b"QUJD", 16 * MIB // 3)
EMOJI = '"😀'.encode()

CASES = {
    "the largest read": (FILE_READ, _reply((b'{"buf-b64": "', 1), BASE64_32_MIB, (b'"}', 1))),
    "two full streams": (
        EXEC_STATUS,
        _reply((b'{"out-data": "', 1), BASE64_16_MIB, (b'", "err-data": "', 1), BASE64_16_MIB, (b'"}', 1)),
    ),
    "no line end": (OS_INFO, ((b"x", 200 * MIB),)),
    "a long line": (OS_INFO, _reply((b'"', 1), (b"x", 200 * MIB), (b'"', 1))),
    "a long line where a file belongs": (FILE_READ, _reply((b'"', 1), (b"x", 200 * MIB), (b'"', 1))),
    "lists": (FILE_READ, _reply((b"[", 1), (b"[],", 14 * MIB), (b"0]", 1))),
    "few lists": (OS_INFO, _reply((b"[", 1), (b"[],", 100_000), (b"0]", 1))),
    "objects": (OS_INFO, _reply((b"[", 1), (b'{"a":{}},', 80_000), (b"0]", 1))),
    "numbers": (FILE_READ, _reply((b"[", 1), (b"1.5,", 10 * MIB), (b"0]", 1))),
    "nesting": (FILE_READ, _reply((b"[", 42 * MIB))),
    "wide characters": (OS_INFO, _reply((EMOJI, 1), (b"x", 4 * MIB - 100), (b'"', 1))),
    "wide characters and a half one": (OS_INFO, _reply((EMOJI + b"\\ud800", 1), (b"x", 4 * MIB - 100), (b'"', 1))),
    "a long text of wide characters": (FILE_READ, _reply((b'"', 1), ("😀".encode(), 10 * MIB), (b'"', 1))),
    "a wide character beside a long text": (FILE_READ, _reply((b"[" + EMOJI + b'","', 1), BASE64_32_MIB, (b'"]', 1))),
    "escapes": (FILE_READ, _reply((b'"', 1), (b"\\\\", 21 * MIB), (b'"', 1))),
    "quotes": (FILE_READ, _reply((b'""', 21 * MIB))),
    "a long text and quotes": (
        FILE_READ,
        _reply((b'["', 1), (b"x", 20 * MIB), (b'",', 1), (b'"",', 6 * MIB), (b"0]", 1)),
    ),
    "a long text that is no base64": (FILE_READ, _reply((b'{"buf-b64": "', 1), (b",:[{}]", 7 * MIB), (b'"}', 1))),
    "replies to others": (OS_INFO, ((b'{"return": {}, "id": 1}\n', 300_000), *_reply((b"{}", 1)))),
}
TAKEN = {
    "the largest read",
    "two full streams",
    "few lists",
    "objects",
    "wide characters",
    "a wide character beside a long text",
    "a long text that is no base64",
    "replies to others",
}


@pytest.fixture
async def hostile(path: Path) -> AsyncIterator[FakeAgent]:
    async with FakeAgent(path) as fake:
        yield fake


@pytest.mark.parametrize("case", CASES)
async def test_memory_is_bounded_and_the_next_call_works(hostile: FakeAgent, case: str) -> None:
    (command, arguments), parts = CASES[case]

    async def answer(request: Request) -> bytes:
        pieces = (piece.replace(b"ID", str(request.id).encode()) * times for piece, times in parts)
        data = memoryview(b"".join(pieces))
        for start in range(0, len(data), PIECE_BYTES):
            await hostile.send(bytes(data[start : start + PIECE_BYTES]))
        return b""

    hostile.answers[command] = answer
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        str(hostile.path),
        json.dumps([command, arguments]),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    async with asyncio.timeout(TIMEOUT_S):
        stdout, _ = await child.communicate()
    assert child.returncode == 0
    outcome, growth_mib = json.loads(stdout)
    print(f"{case}: {growth_mib} MiB, {outcome}")
    assert growth_mib < MAX_GROWTH_MIB
    assert (outcome == "success") == (case in TAKEN)


async def _child(path: Path, command: str, arguments: dict[str, object]) -> None:
    async with GuestAgent(path) as agent:
        await agent.ping(timeout_s=TIMEOUT_S)
        idle_mib = _peak_mib(reset=True)
        outcome = "success"
        try:
            await agent.execute(command, arguments, timeout_s=TIMEOUT_S)
        except AgentError as error:
            outcome = str(error)
        growth_mib = _peak_mib() - idle_mib
        await agent.ping(timeout_s=TIMEOUT_S)
    print(json.dumps([outcome, growth_mib]))


def _peak_mib(*, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident: man 5 proc
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    asyncio.run(_child(Path(sys.argv[1]), *json.loads(sys.argv[2])))
