"""The helper, the controller and the gateway as child processes: started together, ended in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

from vmherd.api.v1.controller_pb2 import LaunchRequest, PlanRequest
from vmherd.cli.herd_files import settings_file
from vmherd.client import Client
from vmherd.model.errors import Aborted, DeadlineExceeded, Unavailable, VmherdError
from vmherd.model.layout import Herd

READY_TIMEOUT_S = 60.0
MEASURE_TIMEOUT_S = 30.0
"""A host's first plan measures its accelerators."""
END_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.05
PROBE_TIMEOUT_S = 2.0
TAIL_LINES = 10

T = TypeVar("T")


class ProcessEnded(Aborted):
    """One of the three ended by itself; `tail` has the last lines of its log."""

    reason = "PROCESS_ENDED"

    def __init__(self, message: str, tail: Sequence[str]) -> None:
        super().__init__(message)
        self.tail = tail


@dataclass(frozen=True)
class Child:
    """One of the three."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    log_start: int
    """Where this run's lines begin: the log goes on from run to run."""


@dataclass(frozen=True)
class Processes:
    """The three, ready."""

    children: tuple[Child, ...]
    http: str
    """Where the gateway listens, as HOST:PORT."""

    async def until_one_ends(self) -> NoReturn:
        """Waits until one of the three ends, which it should not.

        Raises:
            ProcessEnded: it did.
        """
        await _until_one_ends(self.children)


@contextlib.asynccontextmanager
async def running(herd: Herd) -> AsyncIterator[Processes]:
    """The three processes with the settings of this run directory, ready to be used; gone when the context is left.

    Raises:
        ProcessEnded: one of them ended by itself.
        DeadlineExceeded: they did not become ready.
    """
    herd.gateway_address.unlink(missing_ok=True)
    children: list[Child] = []
    try:
        for name, options in (
            ("qemu", ()),
            ("controller", ()),
            ("gateway", ("--address-file", str(herd.gateway_address))),
        ):
            children.append(await _start(herd, name, options))
        address = await race(_until_ready(herd), _until_one_ends(children))
        yield Processes(tuple(children), address)
    finally:
        for child in reversed(children):
            await _end(child)
        herd.gateway_address.unlink(missing_ok=True)


async def race(*contestants: Coroutine[Any, Any, T]) -> T:
    """The result of whichever ends first; the others are cancelled, and what they clean up is waited for.

    Raises:
        Exception: whatever one of them raises.
    """
    tasks = [asyncio.ensure_future(contestant) for contestant in contestants]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return done.pop().result()


async def _start(herd: Herd, name: str, options: Sequence[str]) -> Child:
    path = herd.logs / f"{name}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        log_start = os.fstat(log).st_size
        process = await asyncio.create_subprocess_exec(
            # They also end where we are killed, or the next `up` would find the directory taken.
            *("setpriv", "--pdeathsig", "TERM", "--"),
            # Without -P, `-m` would take modules from the directory in which we were started.
            *(sys.executable, "-P", "-m", "vmherd", name, "--settings", str(settings_file(herd, name)), *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end them in order
        )
    finally:
        os.close(log)
    return Child(name, process, path, log_start)


async def _end(child: Child) -> None:
    if child.process.returncode is not None:
        return
    child.process.terminate()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await child.process.wait()
    except TimeoutError:
        print(f"vmherd: {child.name} did not end within {END_TIMEOUT_S:.0f} s and is killed", file=sys.stderr)
        child.process.kill()
        await child.process.wait()


async def _until_one_ends(children: Sequence[Child]) -> NoReturn:
    async def ended(child: Child) -> Child:
        await child.process.wait()
        return child

    child = await race(*(ended(child) for child in children))
    with child.log.open("rb") as log:
        log.seek(child.log_start)
        lines = log.read().decode(errors="replace").splitlines()
    raise ProcessEnded(
        f"{child.name} {_how(child.process.returncode or 0)}; its log is {child.log}", lines[-TAIL_LINES:]
    )


def _how(returncode: int) -> str:
    return f"was ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with code {returncode}"


async def _until_ready(herd: Herd) -> str:
    missing = "the gateway did not say where it listens"
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                with contextlib.suppress(FileNotFoundError):
                    address = herd.gateway_address.read_text().strip()
                    missing = await asyncio.to_thread(_what_is_missing, herd, address)
                    if not missing:
                        return address
                await asyncio.sleep(POLL_INTERVAL_S)
    except TimeoutError:
        raise DeadlineExceeded(
            f"not ready after {READY_TIMEOUT_S:.0f} s: {missing}; the logs are in {herd.logs}", reason="NOT_READY"
        ) from None


def _what_is_missing(herd: Herd, address: str) -> str:
    """What the gateway cannot reach, or the controller cannot; empty when all three are there."""
    connection = http.client.HTTPConnection(address, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"the gateway on {address} does not answer: {error}"
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        return body
    with Client(herd.controller_socket) as client:
        try:
            client.instances.Plan(
                PlanRequest(launch=LaunchRequest(name=f"probe-{uuid4().hex}")), timeout=MEASURE_TIMEOUT_S
            )
        except (Unavailable, DeadlineExceeded) as error:
            return error.message
        except VmherdError:
            pass  # the helper was asked; a launch will get the same answer and tell it
    return ""
