from __future__ import annotations

import asyncio

import pytest

from vmherd.cli.processes import race

pytestmark = pytest.mark.anyio


async def forever(cleaned: list[str], name: str) -> str:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)  # cleaning up may take a turn of the loop
        cleaned.append(name)
    raise AssertionError


async def at_once(result: str) -> str:
    return result


async def fails() -> str:
    raise LookupError("why")


async def test_the_first_result_counts_and_the_others_have_cleaned_up() -> None:
    cleaned: list[str] = []
    assert await race(forever(cleaned, "a"), at_once("won"), forever(cleaned, "b")) == "won"
    assert sorted(cleaned) == ["a", "b"]


async def test_an_error_ends_the_race() -> None:
    cleaned: list[str] = []
    with pytest.raises(LookupError):
        await race(forever(cleaned, "a"), fails())
    assert cleaned == ["a"]


async def test_an_error_of_a_loser_is_not_lost() -> None:
    async def cannot_clean_up() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            raise LookupError("left behind")

    with pytest.raises(LookupError, match="left behind"):
        await race(cannot_clean_up(), at_once("won"))


async def test_a_cancelled_race_cancels_all() -> None:
    cleaned: list[str] = []
    task = asyncio.create_task(race(forever(cleaned, "a"), forever(cleaned, "b")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(cleaned) == ["a", "b"]
