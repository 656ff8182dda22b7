"""One instance's QMP connection: it comes up, tells events, and comes up again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import structlog
from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from vmherd.controller.usernet import INFO_USERNET
from vmherd.guest_agent.holding import uninterrupted
from vmherd.model.errors import Aborted, DeadlineExceeded, Unavailable
from vmherd.model.lifecycle import Event
from vmherd.model.machine import AGENT_CHARDEV_ID

_log = structlog.get_logger()

# The library calls every failed attempt to connect an error, and a cancelled one a defect. `Monitor` says what matters.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)

COMMAND_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5.0
HANG_UP_TIMEOUT_S = 0.5
"""From a process's end to the end of its connection; the kernel closes it before anybody hears of the end."""

RETRY_DELAYS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Between attempts to connect; the last one again and again."""


class Sink(Protocol):
    """Who wants to hear from QEMU."""

    @property
    def asks_usernet(self) -> bool:
        """Whether QEMU is to be asked of its user-mode networks: its answer names every connection of the guest."""

    def qmp_up(self, *, found: Event, agent_open: bool, usernet: str) -> None:
        """QEMU answers; this is how it is. `usernet` is what it says of its user-mode networks, if that was asked."""

    def qmp_down(self) -> None:
        """The connection is gone."""

    def qmp_event(self, name: str, data: Mapping[str, object]) -> None:
        """QEMU has told an event."""


class _Events(EventListener):
    """Hands events on, from `release` on; the library's own listener would keep every event it ever saw."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._held: list[Message] | None = []

    async def put(self, event: Message) -> None:
        """Called by the client for every event."""
        if self._held is None:
            self._tell(event)
        else:
            self._held.append(event)

    def release(self) -> None:
        """Hands on what came so far, and from now on everything at once."""
        held, self._held = self._held or [], None
        for event in held:
            self._tell(event)

    def _tell(self, event: Message) -> None:
        data = event.get("data")
        self._sink.qmp_event(str(event["event"]), data if isinstance(data, dict) else {})


class _Client(QMPClient):
    """A client whose request ids no earlier client of the socket has used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._prefix = uuid4().hex

    def _get_exec_id(self) -> str:
        return f"{self._prefix}-{super()._get_exec_id()}"


class Monitor:
    """Keeps one QMP connection, the only one that its socket has room for."""

    def __init__(self, socket: Path, name: str, sink: Sink) -> None:
        self._socket = socket
        self._name = name
        self._sink = sink
        self._client: QMPClient | None = None
        self._down = asyncio.Event()
        self._down.set()

    @property
    def up(self) -> bool:
        """Whether QEMU can be asked."""
        return self._client is not None

    async def run(self) -> None:
        """Connects, again and again, until cancelled."""
        failures = 0
        while True:
            client = _Client(self._name)
            events = _Events(self._sink)
            client.register_listener(events)
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await client.connect(str(self._socket))
                    await self._come_up(client)
                events.release()  # only now: an event must not be overtaken by the older state that was asked for
                failures = 0
                while client.runstate is Runstate.RUNNING:
                    await client.runstate_changed()
            except (ConnectError, TimeoutError, QMPError) as error:
                _log.debug("QMP connection failed", name=self._name, error=str(error))
            finally:
                await self._go_down(client)
            await asyncio.sleep(RETRY_DELAYS_S[min(failures, len(RETRY_DELAYS_S) - 1)])
            failures += 1

    async def _come_up(self, client: QMPClient) -> None:
        status = await client.execute("query-status")
        chardevs = await client.execute("query-chardev")
        agent_open = any(
            chardev.get("label") == AGENT_CHARDEV_ID and chardev.get("frontend-open") is True
            for chardev in (chardevs if isinstance(chardevs, list) else [])
        )
        usernet: object = ""
        if self._sink.asks_usernet:
            usernet = await client.execute("human-monitor-command", {"command-line": INFO_USERNET})
        self._client = client
        self._down.clear()
        self._sink.qmp_up(found=_found(status), agent_open=agent_open, usernet=str(usernet))

    async def _go_down(self, client: QMPClient) -> None:
        was_up = self._client is client
        self._client = None
        with contextlib.suppress(EOFError, OSError, QMPError):  # QEMU hung up first, as most connections end
            await uninterrupted(client.disconnect())
        if was_up:
            self._sink.qmp_down()
        self._down.set()

    async def hung_up(self) -> None:
        """Waits until QEMU, which has ended, is no longer connected, so that all that it told has reached the sink."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANG_UP_TIMEOUT_S):
                await self._down.wait()

    async def suspended(self) -> bool:
        """Whether the guest has suspended itself; raises what `execute` raises."""
        return _found(await self.execute("query-status")) is Event.UNDER_CONTROL_SUSPENDED

    async def execute(self, command: str) -> object:
        """Carries out a QMP command without arguments.

        Raises:
            Unavailable: there is no connection, or it broke; the command may have been carried out.
            DeadlineExceeded: QEMU did not answer in time.
            Aborted: QEMU refused.
        """
        if self._client is None:
            raise Unavailable(f"QEMU's control socket of {self._name!r} is not connected", reason="QMP_NOT_CONNECTED")
        try:
            # Not wait_for(): until Python 3.12 it can swallow a cancellation, and with it the deadline of the caller.
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                return await self._client.execute(command)
        except (ExecInterruptedError, StateError) as error:
            raise Unavailable(f"QEMU hung up during {command}", reason="QMP_NOT_CONNECTED") from error
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"QEMU did not answer {command} within {COMMAND_TIMEOUT_S:g} s", reason="QMP_UNRESPONSIVE"
            ) from error
        except QMPError as error:
            raise Aborted(f"QEMU refused {command}: {error}", reason="QMP_COMMAND_FAILED") from error


def _found(status: object) -> Event:
    """What the result of `query-status` says of the guest."""
    match status:
        case {"running": True}:
            return Event.UNDER_CONTROL
        case {"status": "suspended"}:
            return Event.UNDER_CONTROL_SUSPENDED
        case _:
            return Event.UNDER_CONTROL_PAUSED
