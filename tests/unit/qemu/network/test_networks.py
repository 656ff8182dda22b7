"""How networks are kept: what the kernel does with them is shown in `tests/integration/network`."""

from __future__ import annotations

import asyncio
from itertools import accumulate, repeat
from pathlib import Path

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from vmherd.qemu.network import networks
from vmherd.qemu.network.networks import Networks
from vmherd.qemu.network.placement import Plugged
from vmherd.qemu.network.rules import Port

pytestmark = pytest.mark.anyio


def test_harm_that_goes_on_is_repaired_more_and_more_slowly_until_it_was_quiet() -> None:
    quickly = list(accumulate(repeat(0.0, 8), networks._repair_pause_s, initial=networks.REPAIR_PAUSE_S))
    assert quickly == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert networks._repair_pause_s(5.0, networks.QUIET_S + 1) == networks.REPAIR_PAUSE_S


@pytest.mark.parametrize("error", [NetlinkError(19), OSError("no room"), KeyError("what nobody foresaw")], ids=repr)
async def test_a_repair_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    kept = Networks([], tmp_path, dnsmasq_uid=0)
    errors, done = [error, error], asyncio.Event()

    async def restore() -> None:
        if errors:
            raise errors.pop()
        done.set()

    monkeypatch.setattr(kept, "_restore", restore)
    monkeypatch.setattr(networks, "REPAIR_PAUSE_MAX_S", 0.0)
    keeping = asyncio.create_task(kept._keep())
    try:
        kept._harmed.set()
        async with asyncio.timeout(20):
            await done.wait()
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})


async def test_whoever_gives_up_unplugging_leaves_it_to_a_repair(tmp_path: Path) -> None:
    """A machine that is gone would have its address for ever, and its device a right to it."""
    kept = Networks([], tmp_path, dnsmasq_uid=0)
    kept._plugged["a uid"] = Plugged("web", (Port("lab", "vm0", "52:54:00:00:00:07", "10.77.0.7"),))
    async with kept._lock:
        unplugging = asyncio.create_task(kept.unplug("a uid"))
        await asyncio.sleep(0)  # it waits for what is under way
        unplugging.cancel()
        await asyncio.wait({unplugging})
    assert unplugging.cancelled()
    assert kept._plugged == {}
    assert kept._harmed.is_set()
