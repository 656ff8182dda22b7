"""Starts instances when the host has booted: once for each boot, however often the controller starts during it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from pathlib import Path
from uuid import UUID, uuid4, uuid5

import structlog

from vmherd.controller import requests
from vmherd.controller.records import Request
from vmherd.controller.store import Conflict, Put, Store, StoreError
from vmherd.controller.supervisor import Supervisor
from vmherd.model.errors import VmherdError
from vmherd.model.instance import Operation, Verb

_log = structlog.get_logger()

BOOT_KEY = "host/boot-id"
"""Has the last boot of the host whose autostart is done."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STARTS_AT_ONCE = 4
"""A host that has just booted has more to do than to start machines, and each start has its deadlines."""


async def autostart(store: Store, supervisors: Collection[Supervisor]) -> None:
    """Starts the instances that want it and do not run, unless that was done since the host booted."""
    try:
        await _autostart(store, supervisors, _boot_id())
    except (OSError, StoreError) as error:
        _log.error("autostart is off until the controller starts again", error=str(error))


async def _autostart(store: Store, supervisors: Collection[Supervisor], boot_id: str) -> None:
    done = await store.get(BOOT_KEY)
    if done and done.value == boot_id.encode():
        return
    wanted = [supervisor for supervisor in supervisors if supervisor.instance.autostart]
    if wanted:
        names = [supervisor.instance.name for supervisor in wanted]
        _log.info("first start since the host booted", boot_id=boot_id, autostart=names)
    slots = asyncio.Semaphore(STARTS_AT_ONCE)
    await asyncio.gather(*(_start(supervisor, boot_id, slots) for supervisor in wanted))
    await store.transact([Put(BOOT_KEY, boot_id.encode())])


def _boot_id() -> str:
    return BOOT_ID.read_text().strip()


async def _start(supervisor: Supervisor, boot_id: str, slots: asyncio.Semaphore) -> None:
    # What the record says is from before the boot; only QEMU or the helper, which may come later, knows what is true.
    await supervisor.until(lambda: supervisor.monitor.up or _at_rest(supervisor) or supervisor.deleted)
    name = supervisor.instance.name
    # A controller that takes over in the middle does not start again what was started and has been stopped since.
    request_id = f"autostart-{uuid5(UUID(supervisor.instance.uid), boot_id)}"
    operation = Operation(uuid4().hex, Verb.START, (request_id,))
    request = Request(Verb.START, request_id, name, operation.id, time.time())
    async with slots:
        # Meanwhile it may have been started, deleted, or told to stay as it is.
        if supervisor.deleted or not supervisor.instance.autostart or not _at_rest(supervisor):
            return
        try:
            error: Exception | None = requests.error_of(await supervisor.submit(operation, request))
        except Conflict:
            return
        except (VmherdError, StoreError) as failure:
            error = failure
    if error:
        _log.error("autostart failed", name=name, error=str(error))


def _at_rest(supervisor: Supervisor) -> bool:
    return supervisor.ended.is_set() and not supervisor.instance.operation
