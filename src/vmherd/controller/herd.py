"""The instances of a host, and what can be done with them: one method for each thing that users ask for."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from uuid import uuid4

import structlog
from google.protobuf import json_format
from google.rpc import status_pb2

from vmherd.controller.driver import machine_of
from vmherd.controller.helper import Process
from vmherd.controller.records import (
    INSTANCES,
    REQUESTS,
    Outcome,
    Request,
    decode_instance,
    decode_request,
    encode_instance,
    encode_request,
    instance_key,
    request_key,
)
from vmherd.controller.store import Compacted, Compare, Conflict, Put, StoreError
from vmherd.controller.supervisor import Supervisor, World
from vmherd.guest_agent import GuestAgent
from vmherd.image.errors import ImageError
from vmherd.image.registry import KernelImage
from vmherd.model.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    instance_not_found,
    name_taken,
)
from vmherd.model.instance import Hardware, Instance, LaunchSpec, Operation, Verb, check_launch, started
from vmherd.model.lifecycle import State
from vmherd.model.names import check_request_id
from vmherd.model.readiness import WAITING_FOR, Rung
from vmherd.rpc.status import from_status

_log = structlog.get_logger()

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000
REQUESTS_KEPT_S = 24 * 3600.0
REVISIONS_KEPT = 10_000
HOUSEKEEPING_PERIOD_S = 3600.0
DEAD_STATES = frozenset({State.STOPPED, State.FAILED})


@dataclass(frozen=True)
class Snapshot:
    """An instance as it was at a revision of the store."""

    instance: Instance
    revision: int


@dataclass(frozen=True)
class Page:
    """A page of instances, by name."""

    snapshots: tuple[Snapshot, ...]
    next_page_token: str
    revision: int


class ChangeKind(StrEnum):
    """What a watcher is told."""

    CURRENT = "CURRENT"
    SYNCED = "SYNCED"
    CHANGED = "CHANGED"
    DELETED = "DELETED"


@dataclass(frozen=True)
class InstanceChange:
    """One change, or the end of what was there when a watch began."""

    kind: ChangeKind
    revision: int
    instance: Instance | None = None


@dataclass(frozen=True)
class Progress:
    """Where a wait stands."""

    snapshot: Snapshot
    waiting_for: str
    """What is waited for, for people; empty when it has come true."""


@dataclass(frozen=True)
class Plan:
    """What a launch would run."""

    instance: Instance
    argv: tuple[str, ...]
    accelerator: str


class Herd:
    """All instances of this host."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._supervisors: dict[str, Supervisor] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._revision = 0

    async def open(self) -> None:
        """Takes up every instance of the store and begins to follow the helper."""
        entries, self._revision = await self._world.store.list(INSTANCES)
        for entry in entries:
            self._add(decode_instance(entry.value), entry.mod_revision)
        self._spawn(self._world.helper.follow(self))
        self._spawn(self._keep_house())

    async def close(self) -> None:
        """Lets go of every instance. Its machine runs on."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # What users ask for.

    async def launch(self, spec: LaunchSpec, fingerprint: str) -> Snapshot:
        """Makes an instance and starts it; answers when QEMU runs.

        Raises:
            InvalidArgument: a value is wrong.
            NotFound: no such image.
            AlreadyExists: the name is taken.
            Unavailable: the helper cannot be reached; nothing was made.
            Aborted: the instance was made and did not start.
        """
        known = await self._replayed(spec.request_id, fingerprint)
        if known:
            return _snapshot(known)
        instance, _ = await self._planned(spec)
        self._world.helper.check_connected()
        operation = _operation(Verb.LAUNCH, spec.request_id)
        instance = replace(started(instance, time.time()) if spec.start else instance, operation=operation)
        # A caller that goes away must not leave a record that nobody supervises.
        outcome = await asyncio.shield(self._spawn(self._launch(instance, operation, spec.request_id, fingerprint)))
        return _snapshot(outcome)

    async def _launch(self, instance: Instance, operation: Operation, request_id: str, fingerprint: str) -> Outcome:
        key = instance_key(instance.name)
        puts, compares = [Put(key, encode_instance(instance))], [Compare(key, 0)]
        if request_id:
            request = Request(Verb.LAUNCH, fingerprint, instance.name, operation.id, time.time())
            # Before the name: of two equal requests at once the second is the same request, not a clash of names.
            compares.insert(0, Compare(request_key(request_id), 0))
            puts.append(Put(request_key(request_id), encode_request(request)))
        try:
            revision = await self._world.store.transact(puts, compares)
        except Conflict as conflict:
            known = await self._replayed(request_id, fingerprint) if conflict.key != key else None
            if known:
                return known
            raise name_taken(instance.name) from conflict
        except StoreError as error:
            raise _not_stored(error) from error
        return await self._add(instance, revision).outcome(operation.id)

    async def command(
        self,
        verb: Verb,
        name: str,
        fingerprint: str,
        *,
        request_id: str = "",
        force: bool = False,
        grace_s: float | None = None,
    ) -> Snapshot:
        """Starts, stops, restarts or deletes an instance; answers when that is done, after a delete with what it was.

        Raises:
            InvalidArgument: the request id is none, or was used for another request.
            NotFound: no such instance.
            FailedPrecondition: the instance's state forbids it.
            Unavailable: the helper cannot be reached and the command needs it; nothing was begun.
            Aborted: it was carried out and failed.
        """
        violations = list(check_request_id(request_id))
        if violations:
            raise InvalidArgument.of(violations)
        outcome = await self._replayed(request_id, fingerprint)
        if not outcome:
            supervisor = self.find(name)
            if verb is not Verb.STOP or force:
                self._world.helper.check_connected()
            operation = _operation(verb, request_id, force=force, grace_s=grace_s)
            request = Request(verb, fingerprint, name, operation.id, time.time()) if request_id else None
            try:
                outcome = await supervisor.submit(operation, request)
            except Conflict as conflict:
                outcome = await self._replayed(request_id, fingerprint)
                if not outcome:
                    raise _not_stored(conflict) from conflict
            except StoreError as error:
                raise _not_stored(error) from error
        return _snapshot(outcome)

    def info(self, name: str) -> Snapshot:
        """One instance, from memory; raises `NotFound`."""
        return _now(self.find(name))

    async def pause(self, name: str) -> Snapshot:
        """Halts an instance's virtual CPUs."""
        supervisor = self.find(name)
        await supervisor.pause()
        return _now(supervisor)

    async def resume(self, name: str) -> Snapshot:
        """Lets an instance's virtual CPUs run on."""
        supervisor = self.find(name)
        await supervisor.resume()
        return _now(supervisor)

    def agent(self, name: str) -> GuestAgent:
        """An instance's guest agent; see `Supervisor.open_agent` for what it raises."""
        return self.find(name).open_agent()

    def list(self, *, page_size: int, page_token: str, label_selector: Iterable[str]) -> Page:
        """A page of instances, from memory."""
        after = _name_of_token(page_token)
        wanted = [selector.partition("=") for selector in label_selector]
        size = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        matching = [
            supervisor
            for name, supervisor in sorted(self._supervisors.items())
            if name > after and not supervisor.deleted and _has_labels(supervisor.instance, wanted)
        ]
        page = tuple(_now(supervisor) for supervisor in matching[:size])
        token = _token_of_name(page[-1].instance.name) if len(matching) > size else ""
        revision = max([self._revision, *(supervisor.revision for supervisor in self._supervisors.values())])
        return Page(page, token, revision)

    async def wait(self, name: str, until: Rung | None, timeout_s: float) -> AsyncIterator[Progress]:
        """Tells how an instance comes along until it reaches a rung; with None, until it is stopped or failed.

        Raises:
            NotFound: no such instance, or it was deleted meanwhile.
            FailedPrecondition: it cannot come true any more, as the instance does not run.
            DeadlineExceeded: time is up.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        supervisor = self.find(name)
        while not supervisor.deleted:
            changed, instance = supervisor.changed, supervisor.instance
            waiting_for = _waiting_for(instance, until)
            yield Progress(_now(supervisor), waiting_for)
            if not waiting_for:
                return
            if until and instance.state in DEAD_STATES and not instance.operation:
                raise _never(instance, until)
            try:
                async with asyncio.timeout_at(deadline_s):
                    await changed.wait()
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"{name!r} is {supervisor.instance.state}; waited {timeout_s:g} s for {waiting_for}",
                    reason="WAIT_TIMEOUT",
                    metadata={"name": name, "state": supervisor.instance.state},
                ) from error
        raise instance_not_found(name)

    async def watch(self, from_revision: int, name: str) -> AsyncIterator[InstanceChange]:
        """Every change of every instance, or of one, after a revision; from 0 on also how they are now.

        Raises:
            OutOfRange: the revision is older than the log, or has not been yet.
        """
        entries, revision = await self._world.store.list(INSTANCES)
        if not 0 <= from_revision <= revision:
            raise OutOfRange(
                f"revision {from_revision} has not been: the store is at {revision}; list again and watch from there",
                reason="REVISION_UNKNOWN",
                metadata={"revision": revision},
            )
        if not from_revision:
            for entry in entries:
                if name in ("", entry.key.removeprefix(INSTANCES)):
                    yield InstanceChange(ChangeKind.CURRENT, entry.mod_revision, decode_instance(entry.value))
            yield InstanceChange(ChangeKind.SYNCED, revision)
        try:
            async for change in self._world.store.watch(INSTANCES, from_revision or revision):
                if name not in ("", change.key.removeprefix(INSTANCES)):
                    continue
                kind = ChangeKind.CHANGED if change.value is not None else ChangeKind.DELETED
                value = change.value if change.value is not None else change.previous
                yield InstanceChange(kind, change.revision, decode_instance(value) if value else None)
        except Compacted as error:
            raise OutOfRange(
                f"the changes after revision {from_revision} are no longer kept; list again and watch from there",
                reason="REVISION_COMPACTED",
                metadata={"compacted_revision": error.revision},
            ) from error

    async def plan(self, spec: LaunchSpec) -> Plan:
        """What a launch would run; raises what the launch would raise before it makes anything."""
        instance, image = await self._planned(spec)
        host = await self._world.helper.host()
        argv = await self._world.helper.plan(machine_of(replace(instance, generation=1), image, self._world.state))
        return Plan(instance, tuple(argv), f"{host.accelerator} ({host.accelerator_detail})")

    async def _planned(self, spec: LaunchSpec) -> tuple[Instance, KernelImage]:
        violations = list(check_launch(spec))
        if violations:
            raise InvalidArgument.of(violations)
        if spec.name in self._supervisors and not self._supervisors[spec.name].deleted:
            raise name_taken(spec.name)
        try:
            image = self._world.images.get(spec.image)
        except ImageError as error:
            raise NotFound(
                str(error), reason="IMAGE_NOT_FOUND", metadata={"type": "image", "name": spec.image}
            ) from error
        hardware = Hardware(
            cpus=spec.cpus if spec.cpus is not None else image.default_cpus,
            memory_mib=spec.memory_mib if spec.memory_mib is not None else image.default_memory_mib,
        )
        host = await self._world.helper.host()
        if hardware.memory_mib > host.memory_mib:
            raise InvalidArgument.of(
                [
                    FieldViolation(
                        "hardware.memory_mib",
                        f"must be at most the host's {host.memory_mib} MiB, is {hardware.memory_mib}",
                    )
                ]
            )
        instance = Instance(
            name=spec.name,
            uid=str(uuid4()),
            image=spec.image,
            hardware=hardware,
            labels=dict(spec.labels),
            created_at_s=time.time(),
        )
        return instance, image

    def find(self, name: str) -> Supervisor:
        """The supervisor of an instance; raises `NotFound`."""
        supervisor = self._supervisors.get(name)
        if not supervisor or supervisor.deleted:
            raise instance_not_found(name)
        return supervisor

    # What the helper tells (`helper.Listener`).

    def process_seen(self, process: Process) -> None:
        """A process is there, has started or has ended."""
        for supervisor in self._supervisors.values():
            if supervisor.instance.uid == process.uid:
                supervisor.process_seen(process)
                return
        if process.ended_at_s is None:
            _log.warning("the helper runs a machine that has no record here", uid=process.uid, pid=process.pid)

    def all_seen(self, uids: frozenset[str]) -> None:
        """The helper was reached and these are all the processes that it knows."""
        for supervisor in self._supervisors.values():
            if supervisor.instance.uid not in uids:
                supervisor.process_not_seen()

    def helper_lost(self) -> None:
        """The helper cannot be reached."""
        for supervisor in self._supervisors.values():
            supervisor.helper_lost()

    # Inside.

    def _add(self, instance: Instance, revision: int) -> Supervisor:
        supervisor = Supervisor(self._world, instance, revision)
        self._supervisors[instance.name] = supervisor
        self._spawn(self._supervise(supervisor))
        return supervisor

    async def _supervise(self, supervisor: Supervisor) -> None:
        await supervisor.run()
        self._revision = max(self._revision, supervisor.revision)
        if self._supervisors.get(supervisor.instance.name) is supervisor:
            del self._supervisors[supervisor.instance.name]

    async def _replayed(self, request_id: str, fingerprint: str) -> Outcome | None:
        """What came of an earlier request with this id; waits for it where it is under way. None for a new one."""
        while request_id:
            entry = await self._world.store.get(request_key(request_id))
            if not entry:
                break
            request = decode_request(entry.value)
            if request.fingerprint != fingerprint:
                raise InvalidArgument(
                    f"request_id {request_id!r} was used for another request; take a new one for every request",
                    reason="REQUEST_ID_REUSED",
                    metadata={"request_id": request_id},
                )
            if request.outcome:
                return replace(request.outcome, revision=entry.mod_revision)
            supervisor = self._supervisors.get(request.name)
            if not supervisor:
                raise Unavailable("the first request with this id is being taken up; ask again", reason="TRY_AGAIN")
            with contextlib.suppress(LookupError):  # it was settled since the store was read
                return await supervisor.outcome(request.operation_id)
        return None

    async def _keep_house(self) -> None:
        """Forgets old requests and old changes, for the store must not grow for ever."""
        while True:
            entries, revision = await self._world.store.list(REQUESTS)
            oldest_s = time.time() - REQUESTS_KEPT_S
            for entry in entries:
                request = decode_request(entry.value)
                if request.outcome and request.accepted_at_s < oldest_s:
                    await self._world.store.transact([Put(entry.key, None)], [Compare(entry.key, entry.mod_revision)])
            await self._world.store.compact(max(0, revision - REVISIONS_KEPT))
            await asyncio.sleep(HOUSEKEEPING_PERIOD_S)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _operation(verb: Verb, request_id: str, *, force: bool = False, grace_s: float | None = None) -> Operation:
    return Operation(
        id=uuid4().hex, verb=verb, request_ids=(request_id,) if request_id else (), force=force, grace_s=grace_s
    )


def _now(supervisor: Supervisor) -> Snapshot:
    return Snapshot(supervisor.instance, supervisor.revision)


def _snapshot(outcome: Outcome) -> Snapshot:
    """The instance that a command left; raises the error that it came to."""
    if outcome.error:
        raise from_status(json_format.Parse(outcome.error, status_pb2.Status()))
    if not outcome.instance:
        raise ValueError("an outcome without error has an instance")
    return Snapshot(outcome.instance, outcome.revision)


def _not_stored(error: StoreError) -> ResourceExhausted:
    return ResourceExhausted(
        f"nothing was changed: {error}; is the disk of the state directory full?", reason="STORE_FAILED"
    )


def _waiting_for(instance: Instance, until: Rung | None) -> str:
    """What has to come true next; empty when all of it has."""
    if until is None:
        return "" if instance.state in DEAD_STATES and not instance.operation else "the instance to end"
    reached = instance.readiness.reached or 0
    return WAITING_FOR[Rung(reached + 1)] if reached < until else ""


def _never(instance: Instance, until: Rung) -> FailedPrecondition:
    exit_ = instance.last_exit
    why = f": {exit_.detail}" if exit_ else ""
    return FailedPrecondition(
        f"{instance.name!r} is {instance.state} and will not reach {until.name}{why}",
        reason="INSTANCE_FAILED" if instance.state is State.FAILED else "INSTANCE_STOPPED",
        metadata={"name": instance.name, "state": instance.state}
        | ({"cause": exit_.cause, "stderr_tail": exit_.stderr_tail} if exit_ else {}),
    )


def _has_labels(instance: Instance, wanted: Iterable[tuple[str, str, str]]) -> bool:
    return all(
        key in instance.labels and (not equals or instance.labels[key] == value) for key, equals, value in wanted
    )


def _token_of_name(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _name_of_token(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token.encode()).decode()
    except (binascii.Error, UnicodeError) as error:
        raise InvalidArgument.of(
            [FieldViolation("page_token", "must be the next_page_token of an earlier page")]
        ) from error
