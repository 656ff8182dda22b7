"""Programs for those who wait for them, on the real agent."""

from __future__ import annotations

import asyncio
import glob
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty

from tests.contract.guest_agent.conftest import QemuGa
from tests.unit.controller.conftest import DEADLINE_S
from vmherd.api.v1.process_pb2 import ExecRequest, Process, ProcessEvent, RunRequest
from vmherd.controller import processes
from vmherd.controller.agent_calls import ANSWER_MARGIN_S, time_left_s
from vmherd.controller.processes import ProcessServicer
from vmherd.guest_agent import GuestAgent, spool
from vmherd.model.errors import DeadlineExceeded, InvalidArgument

pytestmark = pytest.mark.anyio

COMMANDS = {
    *("guest-ping", "guest-sync", "guest-sync-delimited", "guest-info", "guest-exec", "guest-exec-status"),
    *("guest-file-open", "guest-file-read", "guest-file-seek", "guest-file-close"),
}
MIB = 1 << 20


@dataclass
class Caller:
    """What a call knows of its caller."""

    remaining_s: float | None = None

    def time_remaining(self) -> float | None:
        return self.remaining_s


@pytest.fixture
async def servicer(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ProcessServicer]:
    """ProcessService for one agent, of whose programs no file may be left."""
    mark = secrets.token_hex(8)
    monkeypatch.setattr(spool, "new_token", lambda: mark + secrets.token_hex(8))
    peer = QemuGa(directory / "agent.sock", harmless=COMMANDS)
    await peer.start()
    try:
        async with GuestAgent(peer.path) as agent:
            herd: Any = SimpleNamespace(find=lambda _: SimpleNamespace(open_agent=lambda: agent))
            yield ProcessServicer(herd, detached=SimpleNamespace())  # type: ignore[arg-type]
            assert glob.glob(f"/tmp/*{mark}*", include_hidden=True) == []
    finally:
        await peer.stop()


async def exec_(servicer: ProcessServicer, *requests: ExecRequest) -> list[ProcessEvent]:
    """All events of a caller who says this and then waits."""

    async def said() -> AsyncIterator[ExecRequest]:
        for request in requests:
            yield request
        await asyncio.get_running_loop().create_future()

    async with asyncio.timeout(3 * DEADLINE_S):
        caller: Any = Caller()
        return [event async for event in servicer.Exec(said(), caller)]


def command(*words: str) -> ExecRequest:
    return ExecRequest(run=RunRequest(name="web", command=words), input_follows=True)


async def test_the_caller_hears_how_much_of_the_input_was_taken(servicer: ProcessServicer) -> None:
    inputs = [ExecRequest(input=bytes(MIB)), ExecRequest(input=b"end"), ExecRequest(input=b"")]
    events = await exec_(servicer, command("wc", "-c"), *inputs)
    taken = [event.input_taken for event in events if event.HasField("input_taken")]
    assert taken == sorted(taken)
    assert taken[-1] == MIB + 3
    assert [event.output.text.strip() for event in events if event.HasField("output")] == [str(MIB + 3)]


async def test_the_end_is_heard_before_input_that_nobody_reads(servicer: ProcessServicer) -> None:
    inputs = [ExecRequest(input=b"x" * (MIB // 4))] * 12
    events = await exec_(servicer, command("sleep", "60"), *inputs, ExecRequest(end=Empty()))
    assert events[-1].process.state == Process.EXITED
    assert events[-1].process.signal == 15


async def test_a_caller_that_says_nothing_is_not_waited_for(
    servicer: ProcessServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "CALLER_TIMEOUT_S", 0.01)
    with pytest.raises(DeadlineExceeded) as raised:
        await exec_(servicer)
    assert raised.value.reason == "CALLER_SILENT"


async def test_the_command_comes_first(servicer: ProcessServicer) -> None:
    with pytest.raises(InvalidArgument, match="run"):
        await exec_(servicer, ExecRequest(input=b"x"))


async def test_a_caller_whose_deadline_comes_first_hears_that_time_was_up(servicer: ProcessServicer) -> None:
    caller: Any = Caller(remaining_s=2.0)
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    with pytest.raises(DeadlineExceeded) as raised:
        await servicer.Run(RunRequest(name="web", command=["sleep", "60"]), caller)
    assert raised.value.reason == "COMMAND_TIMED_OUT"
    assert loop.time() - started_s < caller.remaining_s


@pytest.mark.parametrize(("remaining_s", "left_s"), [(None, 60.0), (100.05, 97.0), (4.05, 3.0), (0.0, 0.0)])
def test_some_time_is_kept_for_what_comes_after(remaining_s: float | None, left_s: float) -> None:
    caller: Any = Caller(remaining_s)
    assert ANSWER_MARGIN_S == 0.05
    assert time_left_s(caller, 60.0, tidy_up_s=3.0) == pytest.approx(left_s)
