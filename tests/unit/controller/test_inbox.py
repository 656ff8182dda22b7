"""Messages are handled in turn, and each sender hears what came of its own."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from vmherd.controller.inbox import Inbox

pytestmark = pytest.mark.anyio
DEADLINE_S = 30.0


async def test_messages_are_handled_in_turn() -> None:
    inbox, seen = Inbox("web"), []

    async def handle(number: int) -> None:
        seen.append(number)
        await asyncio.sleep(0)
        seen.append(number)

    for number in (1, 2):
        inbox.put(partial(handle, number))
    async with asyncio.timeout(DEADLINE_S):
        await inbox.serve(lambda: len(seen) == 4)
    assert seen == [1, 1, 2, 2]


async def test_what_came_in_before_the_end_gets_its_answer() -> None:
    inbox, over = Inbox("web"), []

    async def end() -> None:
        over.append(True)

    async def late() -> str:
        return "too late"

    inbox.put(end)
    answer = asyncio.create_task(inbox.ask(late))
    await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE_S):
        await inbox.serve(lambda: bool(over))
        assert await answer == "too late"


async def test_an_error_goes_to_who_asked_and_the_next_message_is_handled() -> None:
    inbox, done = Inbox("web"), []

    async def refuse() -> None:
        raise ValueError("no")

    async def finish() -> None:
        done.append(True)

    answer = asyncio.create_task(inbox.ask(refuse))
    await asyncio.sleep(0)
    inbox.put(refuse)
    inbox.put(finish)
    async with asyncio.timeout(DEADLINE_S):
        await inbox.serve(lambda: bool(done))
    with pytest.raises(ValueError, match="no"):
        await answer


async def test_a_message_is_handled_also_when_nobody_waits_for_it_any_more() -> None:
    inbox, handled = Inbox("web"), []

    async def handle() -> None:
        handled.append(True)

    asking = asyncio.create_task(inbox.ask(handle))
    await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(DEADLINE_S):
        await inbox.serve(lambda: bool(handled))
        await asyncio.wait([asking])
    assert asking.cancelled()
