"""What a process tells the service manager that runs it: sd_notify(3), without its library."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, MutableMapping
from dataclasses import dataclass

import structlog

SEND_TIMEOUT_S = 5.0

_log = structlog.get_logger()


@dataclass(frozen=True)
class ServiceManager:
    """Systemd, or whatever else understands it; nobody where `address` is empty."""

    address: str = ""
    """Of its datagram socket: a path, or a name of the abstract namespace after a NUL."""
    watchdog_s: float = 0.0
    """How long it waits for a sign of life before it ends the process; 0: for ever."""

    @classmethod
    def taken_from(cls, environment: MutableMapping[str, str]) -> ServiceManager:
        """The one that the environment names, which is taken out of it: no child shall speak in our name."""
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_usec = environment.pop("WATCHDOG_USEC", "")
        watchdog_pid = environment.pop("WATCHDOG_PID", "")
        if not address.startswith(("/", "@")):
            return cls()
        if not watchdog_usec.isdecimal() or watchdog_pid not in {"", str(os.getpid())}:
            watchdog_usec = "0"
        return cls(address.replace("@", "\0", 1) if address[0] == "@" else address, int(watchdog_usec) / 1e6)

    async def tell(self, **fields: object) -> None:
        """Sends fields, such as READY=1. That the manager does not take them is no reason to end: it is logged."""
        if not self.address:
            return
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                    sender.setblocking(False)
                    await asyncio.get_running_loop().sock_sendto(sender, text.encode(), self.address)
        except OSError as error:
            _log.warning("the service manager was not told", fields=text, why=str(error) or type(error).__name__)

    @contextlib.asynccontextmanager
    async def told_of_life(self) -> AsyncIterator[None]:
        """Sends signs of life from the event loop: one that hangs gives none."""
        beat = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beat.cancel()
            await asyncio.wait({beat})

    async def _beat(self) -> None:
        while self.watchdog_s:
            await self.tell(WATCHDOG=1)
            await asyncio.sleep(self.watchdog_s / 2)
