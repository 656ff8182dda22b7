"""The QEMU processes of this host: started, found again, watched, ended and forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import structlog

from vmherd.model.errors import FailedPrecondition, NotFound, Unavailable, VmherdError
from vmherd.model.layout import InstanceRun, RunDirectory
from vmherd.model.machine import Machine
from vmherd.qemu.files import Owners
from vmherd.qemu.launch import listening, spawn
from vmherd.qemu.network.rules import Port
from vmherd.qemu.process import (
    Process,
    boot_id,
    find_processes,
    open_pidfd,
    read_record,
    start_ticks,
    stderr_tail,
    temporary,
    write_record,
)

KILL_DEADLINE_S = 10.0
UNPLUG_DEADLINE_S = 10.0

_log = structlog.get_logger()


@dataclass(frozen=True)
class Launch:
    """What it takes to start a machine, beside its run directory."""

    unix_uid: int
    argv: Callable[[Sequence[int]], tuple[str, ...]]
    """QEMU's words, for the descriptors of `InstanceRun.sockets`."""
    before: tuple[str, ...] = ()
    """The words of the programs that become QEMU."""
    descriptors: tuple[int, ...] = ()
    """Those that QEMU inherits beside the sockets'. They are somebody else's to close."""
    ports: tuple[Port, ...] = ()


@dataclass(frozen=True)
class _Running:
    """What the helper holds of a process that runs. The pidfd stays this process's, whatever becomes of its pid."""

    pidfd: int
    child: subprocess.Popen[bytes] | None
    """None for a process of an earlier helper."""
    ended: asyncio.Future[Process]


@dataclass(eq=False)
class _Watcher:
    """The news that one watcher has not seen. A slow one misses steps in between, never the last."""

    news: dict[str, Process] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class ProcessTable:
    """The processes below one run directory. It lives in an event loop; one helper at a time may have it.

    `unplug` takes a machine's ports from the networks of the host: it is called with its uid after its process ended.
    """

    def __init__(self, directory: RunDirectory, owners: Owners, unplug: Callable[[str], Awaitable[None]]) -> None:
        self._directory = directory
        self._owners = owners
        self._unplug = unplug
        self._unplugging: set[asyncio.Task[None]] = set()
        self._processes: dict[str, Process] = {}
        self._running: dict[str, _Running] = {}
        self._watchers: set[_Watcher] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def adopt(self) -> None:
        """Takes over what earlier helpers recorded. A record that cannot be read is left for a person to look at."""
        for path in sorted(self._directory.instances.iterdir()):
            run = InstanceRun(path)
            try:
                process = read_record(run.process)
                if process.uid != path.name:
                    raise ValueError(f"the record of {process.uid}")
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                _log.error("record not readable", path=str(run.process), why=str(error))
                continue
            self._adopt(process, run)

    def _adopt(self, process: Process, run: InstanceRun) -> None:
        pid, ticks = process.pid, process.start_ticks
        if pid is None:
            # The helper ended between this record and the start, or between the start and the record of the pid.
            found = find_processes(process.argv, (0, process.unix_uid))
            if not found:
                with contextlib.suppress(OSError):
                    _clear(run)
                return
            ticks, pid = found[0]
            process = replace(process, pid=pid, start_ticks=ticks)
        if not process.ended:
            pidfd = open_pidfd(pid, ticks) if process.boot_id == boot_id() else None
            if pidfd is None:
                process = replace(process, ended_at_s=time.time(), stderr_tail=stderr_tail(run.stderr))
            else:
                self._watch(process.uid, pidfd, child=None)
        _log.info("adopted", uid=process.uid, pid=process.pid, running=not process.ended)
        self._put(process)

    async def close(self) -> None:
        """Lets go of the processes, which run on."""
        for uid in tuple(self._running):
            self._unwatch(uid)
        if self._unplugging:
            await asyncio.wait(self._unplugging, timeout=UNPLUG_DEADLINE_S)

    def running(self) -> tuple[Process, ...]:
        """The processes that run."""
        return tuple(process for process in self._processes.values() if not process.ended)

    def list(self) -> tuple[Process, ...]:
        """The processes that run and those that ended and were not released."""
        return tuple(self._processes.values())

    async def watch(self) -> AsyncGenerator[Process | None, None]:
        """Every process as it is, then None, then every process that starts or ends; without an end."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            for process in self.list():
                yield process
            yield None
            while True:
                await watcher.arrived.wait()
                watcher.arrived.clear()
                news, watcher.news = watcher.news, {}
                for process in news.values():
                    yield process
        finally:
            self._watchers.discard(watcher)

    async def start(self, machine: Machine, prepared: Callable[[], AbstractAsyncContextManager[Launch]]) -> Process:
        """Starts a machine with what is `prepared` for it, and answers as soon as its process runs.

        Whether QEMU accepted the machine is seen by `watch` and on QEMU's control socket, which is left to the caller.
        The same uid and generation again answers with the process there is, whether it runs or ended.

        Raises:
            FailedPrecondition: QEMU cannot be executed or recorded (`QEMU_DID_NOT_START`), or another generation is
                in the way.
        """
        async with self._lock(machine.uid):
            current = self._processes.get(machine.uid)
            if current is not None and current.generation == machine.generation:
                return current
            if current is not None and not (current.ended and current.generation < machine.generation):
                raise _other_generation(current, machine.generation)
            run = self._directory.instance(machine.uid)
            self._refuse_unreadable(machine.uid, run)
            if current is not None and current.ports:
                await self._unplug(machine.uid)
            async with prepared() as launch:
                # Nothing is awaited in here: a caller who gives up leaves no process or a recorded one.
                return self._spawn(machine, launch, run)

    async def stop(self, uid: str, generation: int, *, grace_s: float) -> Process:
        """Ends a process: SIGTERM, and SIGKILL after the grace; without any grace SIGKILL at once.

        A start under way comes first, and it is its process that ends.

        Raises:
            NotFound: there is no such process.
            FailedPrecondition: another generation is there.
            Unavailable: the kernel has not ended it in 10 s.
        """
        async with self._lock(uid):
            process, running = self._processes.get(uid), self._running.get(uid)
        if process is None:
            raise NotFound(
                f"no process of {uid} is known", reason="PROCESS_NOT_FOUND", metadata={"name": uid, "type": "process"}
            )
        if process.generation != generation:
            raise _other_generation(process, generation)
        if running is None:
            return process
        for number, deadline_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_DEADLINE_S)):
            if deadline_s > 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(running.pidfd, number)
                await asyncio.wait({running.ended}, timeout=deadline_s)
            if running.ended.done():
                return running.ended.result()
        raise Unavailable(
            f"process {process.pid} of {process.name!r} is still there {KILL_DEADLINE_S:g} s after SIGKILL; "
            "the kernel holds it, as it does while a disk or a file server does not answer",
            reason="PROCESS_STUCK",
        )

    async def release(self, uid: str) -> None:
        """Forgets an ended process and removes its run directory. There may be neither. A start under way comes first.

        Raises:
            FailedPrecondition: it runs, its record cannot be read, or its directory holds foreign files.
        """
        async with self._lock(uid):
            process = self._processes.get(uid)
            if process is not None and not process.ended:
                raise FailedPrecondition(
                    f"{process.name!r} runs as process {process.pid}; stop it first", reason="PROCESS_RUNS"
                )
            run = self._directory.instance(uid)
            self._refuse_unreadable(uid, run)
            try:
                _clear(run)
            except OSError as error:
                raise FailedPrecondition(
                    f"cannot remove {run.path}: {error.strerror}; look what is in it and remove it by hand",
                    reason="RUN_DIRECTORY_NOT_REMOVED",
                ) from error
            self._processes.pop(uid, None)

    def _lock(self, uid: str) -> asyncio.Lock:
        return self._locks.setdefault(uid, asyncio.Lock())

    def _refuse_unreadable(self, uid: str, run: InstanceRun) -> None:
        if uid not in self._processes and run.process.exists():
            raise FailedPrecondition(
                f"the record {run.process} cannot be read, so nobody knows whether QEMU runs; "
                f"end the QEMU with -uuid {uid} if there is one, remove the record and start `vmherd qemu` again",
                reason="RECORD_UNREADABLE",
            )

    def _spawn(self, machine: Machine, launch: Launch, run: InstanceRun) -> Process:
        try:
            self._make(run)
            with contextlib.ExitStack() as stack:
                mode = self._owners.mode(0o660)
                sockets = [stack.enter_context(listening(path, self._owners.group, mode)) for path in run.sockets]
                process = Process(
                    *(machine.uid, machine.name, machine.generation, launch.argv(sockets), launch.unix_uid),
                    *(boot_id(), time.time(), launch.ports),
                )
                # Should the helper end right after the start, its successor finds the process by this record's argv.
                write_record(run.process, process)
                child = spawn((*launch.before, *process.argv), (*sockets, *launch.descriptors), run.stderr)
            try:
                process = replace(process, pid=child.pid, start_ticks=start_ticks(child.pid))
                self._watch(process.uid, os.pidfd_open(child.pid), child)
            except OSError:
                child.kill()
                child.wait()
                raise
        except OSError as error:
            self._processes.pop(machine.uid, None)
            with contextlib.suppress(OSError):
                _clear(run)
            raise FailedPrecondition(
                f"{machine.name!r} did not start: {error}",
                reason="QEMU_DID_NOT_START",
                metadata={"name": machine.name},
            ) from error
        self._put(process)
        _log.info("started", uid=machine.uid, name=machine.name, generation=machine.generation, pid=child.pid)
        return process

    def _make(self, run: InstanceRun) -> None:
        """Makes a run directory, empty and reachable for the controller's group."""
        run.path.mkdir(mode=0o700, exist_ok=True)
        _remove_files(run)
        os.chown(run.path, -1, self._owners.group)
        run.path.chmod(self._owners.mode(0o750))

    def _watch(self, uid: str, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            # A pidfd becomes readable when its process ends, whoever its parent is: pidfd_open(2).
            loop.add_reader(pidfd, self._on_end, uid)
        except OSError:
            os.close(pidfd)
            raise
        self._running[uid] = _Running(pidfd, child, loop.create_future())

    def _unwatch(self, uid: str) -> _Running:
        running = self._running.pop(uid)
        asyncio.get_running_loop().remove_reader(running.pidfd)
        os.close(running.pidfd)
        return running

    def _on_end(self, uid: str) -> None:
        running = self._unwatch(uid)
        status = running.child.poll() if running.child else None
        process = replace(
            self._processes[uid],
            ended_at_s=time.time(),
            exit_code=status if status is not None and status >= 0 else None,
            signal=-status if status is not None and status < 0 else None,
            stderr_tail=stderr_tail(self._directory.instance(uid).stderr),
        )
        _log.info(
            "ended", uid=uid, name=process.name, pid=process.pid, exit_code=process.exit_code, signal=process.signal
        )
        self._put(process)
        running.ended.set_result(process)
        if process.ports:
            unplugging = asyncio.create_task(self._unplug_ended(uid))
            self._unplugging.add(unplugging)
            unplugging.add_done_callback(self._unplugging.discard)

    async def _unplug_ended(self, uid: str) -> None:
        async with self._lock(uid):
            process = self._processes.get(uid)
            if process is None or process.ended:  # or it has started again, and what it had before is replaced
                try:
                    await self._unplug(uid)
                except VmherdError as error:
                    _log.error("ports not removed", uid=uid, why=error.message)

    def _put(self, process: Process) -> None:
        self._processes[process.uid] = process
        try:
            write_record(self._directory.instance(process.uid).process, process)
        except OSError as error:
            # The next helper finds the process by what the record said before.
            _log.error("record not written", uid=process.uid, why=str(error))
        for watcher in self._watchers:
            watcher.news[process.uid] = process
            watcher.arrived.set()


def _remove_files(run: InstanceRun) -> None:
    """Removes vmherd's own files and sockets from a run directory."""
    directory = os.open(run.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for path in (*run.sockets, run.stderr, temporary(run.process), run.process):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=directory)
    finally:
        os.close(directory)


def _clear(run: InstanceRun) -> None:
    """Removes the run directory of a process that is over; a foreign file in it stays and is an error."""
    with contextlib.suppress(FileNotFoundError):
        _remove_files(run)
        run.path.rmdir()


def _other_generation(current: Process, wanted: int) -> FailedPrecondition:
    state = "has ended" if current.ended else f"runs as process {current.pid}"
    return FailedPrecondition(
        f"generation {wanted} of {current.name!r} was asked for, and generation {current.generation} {state}",
        reason="OTHER_GENERATION",
        metadata={"name": current.name, "generation": current.generation, "running": not current.ended},
    )
