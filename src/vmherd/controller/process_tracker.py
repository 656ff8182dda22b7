"""Tracks the programs of one instance that outlive those who started them.

The agent tells the end of a program once, so one task asks and nobody else. What the agent says counts only if it is
the agent that started the program: a process id means nothing to another boot of the guest, or to an agent that was
started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from vmherd.controller.process_messages import exited
from vmherd.controller.process_records import (
    ProcessRecord,
    ProcessState,
    encode_process,
    process_key,
)
from vmherd.controller.store import Put, Store, StoreError
from vmherd.controller.store.base import PUTS_MAX
from vmherd.controller.supervisor import Supervisor
from vmherd.controller.tasks import cancelled, spawn
from vmherd.guest_agent import (
    AgentError,
    CommandFailed,
    CommandUnfinished,
    NoLiveOutput,
    Output,
    Process,
    Stream,
    boot_id_of,
    follow,
    start_process,
)
from vmherd.guest_agent.holding import uninterrupted
from vmherd.guest_agent.spool import LINGER_S
from vmherd.model import lifecycle
from vmherd.model.errors import FailedPrecondition, NotFound, ResourceExhausted, VmherdError

PROCESSES_MAX = 100
"""Ended ones included: their output stays in the guest until they are deleted."""

FIRST_PAUSE_S = 0.01
PAUSE_GROWTH = 1.5
PAUSE_MAX_S = 2.0
FOLLOWED_PAUSE_MAX_S = 0.25
RETRY_S = 0.5

_log = structlog.get_logger()


@dataclass
class _Tracked:
    record: ProcessRecord
    process: Process | None = None
    """None until somebody asks for one that an earlier controller started."""


class ProcessTracker:
    """The programs of one instance. `forget` is called when the instance was deleted."""

    def __init__(self, supervisor: Supervisor, store: Store, forget: Callable[[], object]) -> None:
        self._supervisor = supervisor
        self._store = store
        self._forget = forget
        self._tracked: dict[str, _Tracked] = {}
        self._starting = 0
        self._followers = 0
        self._news = asyncio.Event()
        self._saving = asyncio.Lock()
        name = supervisor.instance.name
        self._tasks = [spawn(self._track(), f"processes of {name}"), spawn(self._outlive(), f"end of {name}")]

    @property
    def records(self) -> list[ProcessRecord]:
        """All programs."""
        return [tracked.record for tracked in self._tracked.values()]

    def get(self, process_id: str) -> ProcessRecord:
        """One of them; raises `NotFound`."""
        return self._find(process_id).record

    def take_up(self, record: ProcessRecord) -> None:
        """Goes on with a program that an earlier controller started."""
        self._tracked[record.id] = _Tracked(record)
        self._news.set()

    async def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None,
        input_data: bytes,
        timeout_s: float | None,
    ) -> ProcessRecord:
        """Starts a program; a caller that leaves in the middle does not stop it.

        Raises:
            FailedPrecondition: the instance does not run, or its guest cannot do it.
            ResourceExhausted: there are too many, or it could not be stored.
            AgentError: what the agent's client raises.
        """
        agent = self._supervisor.open_agent()
        instance = self._supervisor.instance
        if len(self._tracked) + self._starting >= PROCESSES_MAX:
            raise ResourceExhausted(
                f"{instance.name!r} has {PROCESSES_MAX} processes, which is the most; delete those that have ended",
                reason="TOO_MANY_PROCESSES",
                metadata={"name": instance.name},
            )

        async def start() -> ProcessRecord:
            boot_id = await boot_id_of(agent)
            process = await start_process(agent, command, env=env, input_data=input_data)
            now_s = time.time()
            record = ProcessRecord(
                uid=instance.uid,
                id=secrets.token_hex(4),
                command=tuple(command),
                started_at_s=now_s,
                generation=instance.generation,
                boot_id=boot_id,
                pid=process.pid,
                token=process.token,
                deadline_at_s=None if timeout_s is None else now_s + timeout_s,
            )
            await self._store_new(record, process)
            self._tracked[record.id] = _Tracked(record, process)
            self._news.set()
            return record

        self._starting += 1
        try:
            return await uninterrupted(start())
        except NoLiveOutput as why:
            raise FailedPrecondition(
                f"{instance.name!r} cannot run processes that outlive their callers: {why}; run the command instead",
                reason="NO_LIVE_OUTPUT",
                metadata={"name": instance.name},
            ) from why
        finally:
            self._starting -= 1

    async def follow(self, process_id: str, offsets: Mapping[Stream, int], *, wait: bool) -> AsyncGenerator[Output]:
        """What a program has written, and with `wait` what comes until it has ended or is lost.

        Raises:
            NotFound: there is no such program, or it was deleted meanwhile.
            FailedPrecondition: the instance does not run.
            AgentError: what the agent's client raises.
        """
        tracked = self._find(process_id)
        reached = dict(offsets)

        async def has_ended() -> bool:
            self._find(process_id)
            return not wait or tracked.record.state is not ProcessState.RUNNING

        self._followers += 1
        self._news.set()
        try:
            while True:
                try:
                    agent = self._supervisor.open_agent()
                    linger_s = LINGER_S if wait else 0.0
                    pieces = follow(agent, tracked.record.token, has_ended, offsets=reached, linger_s=linger_s)
                    async with contextlib.aclosing(pieces):
                        async for piece in pieces:
                            yield piece
                            reached[piece.stream] = piece.offset + len(piece.data)
                    return
                except (AgentError, FailedPrecondition) as error:
                    known = await self._looked()
                    if tracked.record.state is ProcessState.LOST:
                        return  # as a rule its output is lost as well
                    is_final = known and isinstance(error, CommandFailed)
                    if not wait or is_final or tracked.record.state is ProcessState.EXITED:
                        raise
                    await asyncio.sleep(RETRY_S)  # the guest is paused or was reset, which a later look will tell
        finally:
            self._followers -= 1

    async def signal(self, process_id: str, number: int) -> ProcessRecord:
        """Sends a signal to a program that runs, and to what it started.

        Raises:
            NotFound: there is no such program.
            FailedPrecondition: it does not run.
            ResourceExhausted: that it had ended could not be stored.
            AgentError: what the agent's client raises.
        """
        tracked = self._find(process_id)
        if tracked.record.state is ProcessState.RUNNING:
            await self._look()
        if tracked.record.state is not ProcessState.RUNNING:
            raise self._refusal(tracked.record, "signal", f"it is {tracked.record.state}")
        await self._process(tracked).signal(number)
        self._news.set()
        return tracked.record

    async def delete(self, process_id: str, *, force: bool) -> None:
        """Forgets a program, and removes its output from the guest if that can be reached.

        Raises:
            NotFound: there is no such program.
            FailedPrecondition: it runs, and `force` is not set or the instance is not able to end it.
            ResourceExhausted: that it was deleted, or had ended, could not be stored.
            AgentError: it could not be ended.
        """
        tracked = self._find(process_id)
        if tracked.record.state is ProcessState.RUNNING and not force:
            raise self._refusal(tracked.record, "delete", "it runs; signal it first, or force it")

        async def delete() -> None:
            if tracked.record.state is ProcessState.RUNNING:
                await self._look()
            if tracked.record.state is ProcessState.RUNNING:
                await self._process(tracked).end()
            with contextlib.suppress(AgentError, FailedPrecondition):  # with the guest's boot its files are gone
                await self._process(tracked).remove_files()
            self._find(process_id)  # two may delete it at once
            del self._tracked[process_id]  # first, so that a look that is under way does not store it again
            try:
                await self._put(tracked.record, None)
            except ResourceExhausted:
                self._tracked[process_id] = tracked
                raise

        await uninterrupted(delete())

    async def close(self) -> None:
        """Tracks no more. The programs run on."""
        for task in self._tasks:
            await cancelled(task)

    # Inside.

    def _find(self, process_id: str) -> _Tracked:
        if process_id not in self._tracked:
            name = self._supervisor.instance.name
            raise NotFound(
                f"{name!r} has no process {process_id!r}; `vmherd ps {name}` shows those that it has",
                reason="PROCESS_NOT_FOUND",
                metadata={"type": "process", "name": process_id, "instance": name},
            )
        return self._tracked[process_id]

    def _process(self, tracked: _Tracked) -> Process:
        if not tracked.process:
            tracked.process = Process(self._supervisor.open_agent(), tracked.record.pid, tracked.record.token)
        return tracked.process

    def _refusal(self, record: ProcessRecord, verb: str, why: str) -> FailedPrecondition:
        name = self._supervisor.instance.name
        return FailedPrecondition(
            f"cannot {verb} process {record.id!r} of {name!r}: {why}",
            reason="ILLEGAL_PROCESS_STATE",
            metadata={"name": name, "id": record.id, "state": record.state},
        )

    async def _put(self, record: ProcessRecord, value: bytes | None, *, consequence: str = "") -> None:
        name = self._supervisor.instance.name
        try:
            await self._store.transact([Put(process_key(record), value)])
        except StoreError as error:
            raise ResourceExhausted(
                f"process {record.id!r} of {name!r} could not be stored{consequence}: {error}; "
                "is the disk of the state directory full?",
                reason="STORE_FAILED",
                metadata={"name": name, "id": record.id},
            ) from error

    async def _store_new(self, record: ProcessRecord, process: Process) -> None:
        try:
            await self._put(record, encode_process(record), consequence=" and was ended")
        except ResourceExhausted:
            await process.end()
            with contextlib.suppress(AgentError):
                await process.remove_files()
            raise

    async def _outlive(self) -> None:
        """Forgets the programs with their instance."""
        await self._supervisor.until(lambda: self._supervisor.deleted)
        await cancelled(self._tasks[0])
        keys = [process_key(record) for record in self.records]
        self._tracked.clear()
        for start in range(0, len(keys), PUTS_MAX):
            await self._store.transact([Put(key, None) for key in keys[start : start + PUTS_MAX]])
        self._forget()

    async def _track(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            running = any(record.state is ProcessState.RUNNING for record in self.records)
            longest_s = FOLLOWED_PAUSE_MAX_S if self._followers else PAUSE_MAX_S
            pause_s = min(pause_s, longest_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s if running else None):
                    await self._news.wait()
                    pause_s = FIRST_PAUSE_S
                    self._news.clear()
            pause_s *= PAUSE_GROWTH
            await self._looked()

    async def _looked(self) -> bool:
        try:
            await self._look()
        except (AgentError, VmherdError) as error:  # for instance the guest is paused, or the disk full
            _log.debug("processes were not looked at", name=self._supervisor.instance.name, error=str(error))
            return False
        return True

    async def _look(self) -> None:
        """Takes note of what happened to the programs that ran at the last look."""
        running = [tracked for tracked in self._tracked.values() if tracked.record.state is ProcessState.RUNNING]
        instance = self._supervisor.instance
        here = []
        for tracked in running:
            if tracked.record.generation != instance.generation or instance.state not in lifecycle.ACTIVE:
                await self._lose(tracked, "the instance was stopped")
            else:
                here.append(tracked)
        if not here or instance.state not in lifecycle.AGENT_STATES:
            return
        boot_id = await boot_id_of(self._supervisor.open_agent())
        for tracked in here:
            if tracked.record.boot_id != boot_id:
                await self._lose(tracked, "the guest was started anew")
            else:
                await self._ask(tracked)

    async def _ask(self, tracked: _Tracked) -> None:
        deadline_at_s = tracked.record.deadline_at_s
        is_late = deadline_at_s is not None and time.time() >= deadline_at_s
        process = self._process(tracked)
        try:
            if not await process.has_ended():
                if not is_late:
                    return
                # Before it ends: another look may be the first to see the end.
                tracked.record = replace(tracked.record, reason="its time was up")
                await process.end()
        except CommandUnfinished as error:
            if isinstance(error.__cause__, CommandFailed):
                await self._lose(tracked, "the guest's agent does not know it any more: it was started anew")
                return
            raise
        if result := process.result:
            await self._save(tracked, exited(tracked.record, result))

    async def _lose(self, tracked: _Tracked, reason: str) -> None:
        await self._save(tracked, replace(tracked.record, state=ProcessState.LOST, reason=reason))

    async def _save(self, tracked: _Tracked, record: ProcessRecord) -> None:
        async with self._saving:  # looks go on at once, and the first that sees the end is right
            if record.id in self._tracked and tracked.record.state is ProcessState.RUNNING:
                await self._put(record, encode_process(record))
                tracked.record = record
