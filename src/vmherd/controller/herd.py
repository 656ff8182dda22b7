"""The instances of a host, and what can be done with them: one method for each thing that users ask for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import uuid4

import structlog

from vmherd.controller import requests
from vmherd.controller.autostart import autostart
from vmherd.controller.driver import machine_of
from vmherd.controller.helper import Host, MachinePlan, Process
from vmherd.controller.interfaces import assigned
from vmherd.controller.records import (
    INSTANCES,
    Outcome,
    Request,
    decode_instance,
    encode_instance,
    instance_key,
)
from vmherd.controller.store import Compare, Conflict, Entry, Put, StoreError
from vmherd.controller.supervisor import Supervisor
from vmherd.controller.tasks import spawn
from vmherd.controller.views import Snapshot, snapshot_of
from vmherd.controller.world import World
from vmherd.image.errors import ImageError
from vmherd.image.registry import KernelImage
from vmherd.model.errors import (
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    VmherdError,
    instance_not_found,
    name_taken,
)
from vmherd.model.instance import (
    Hardware,
    Instance,
    LaunchSpec,
    NetworkInterface,
    Operation,
    Verb,
    check_launch,
    started,
)
from vmherd.model.names import check_request_id
from vmherd.model.network import Network

T = TypeVar("T")

_log = structlog.get_logger()

REVISIONS_KEPT = 10_000
HOUSEKEEPING_PERIOD_S = 3600.0


@dataclass(frozen=True)
class Plan:
    """What a launch would run and make."""

    instance: Instance
    machine: MachinePlan
    accelerator: str


class Herd:
    """All instances of this host."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._supervisors: dict[str, Supervisor] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._revision = 0
        self._adding = asyncio.Lock()
        """Held while an instance is in the store and has no supervisor yet."""

    async def open(self) -> None:
        """Takes up every instance of the store and begins to follow the helper.

        Raises:
            FailedPrecondition: a record is none; nothing was taken up.
        """
        entries, self._revision = await self._world.store.list(INSTANCES)
        for entry, instance in [(entry, _readable(entry)) for entry in entries]:
            self._add(instance, entry.mod_revision)
        self._keep(spawn(self._world.helper.follow(self), "news of the helper"))
        self._keep(spawn(self._keep_house(), "housekeeping"))
        self._keep(spawn(autostart(self._world.store, self.supervisors), "autostart"))

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
            ResourceExhausted: a network has no address left, or it could not be stored; nothing was made.
            Aborted: the instance was made and did not start.
        """
        _refuse(check_launch(spec))
        known = await self._replayed(spec.request_id, fingerprint)
        if known:
            return _snapshot(known)
        instance, _, host = await self._planned(spec)
        self._world.helper.check_connected()
        operation = _operation(Verb.LAUNCH, spec.request_id)
        instance = replace(started(instance, time.time()) if spec.start else instance, operation=operation)
        # A caller that goes away must not leave a record that nobody supervises.
        launch = self._launch(instance, operation, spec, host.networks, fingerprint)
        outcome = await asyncio.shield(self._keep(asyncio.create_task(launch)))
        return _snapshot(outcome)

    async def _launch(
        self, instance: Instance, operation: Operation, spec: LaunchSpec, networks: Sequence[Network], fingerprint: str
    ) -> Outcome:
        key = instance_key(instance.name)
        puts, compares = [], [Compare(key, 0)]
        if spec.request_id:
            request = Request(Verb.LAUNCH, fingerprint, instance.name, operation.id, time.time())
            # Before the name: of two equal requests at once the second is the same request, not a clash of names.
            put, compare = requests.beginning(spec.request_id, request)
            puts.append(put)
            compares.insert(0, compare)
        try:
            async with self._adding:  # no other launch gets the same addresses
                instance = self._with_nics(instance, spec.nics, networks)
                puts.append(Put(key, encode_instance(instance)))
                revision = await self._world.store.transact(puts, compares)
                supervisor = self._add(instance, revision)
        except Conflict as conflict:
            known = await self._replayed(spec.request_id, fingerprint) if conflict.key != key else None
            if known:
                return known
            raise name_taken(instance.name) from conflict
        except StoreError as error:
            raise _not_stored(error) from error
        return await supervisor.outcome(operation.id)

    def _with_nics(
        self, instance: Instance, asked: Sequence[NetworkInterface], networks: Sequence[Network]
    ) -> Instance:
        # An instance of the same name is this launch, made a moment ago by an equal request, or else its name is taken.
        others = [other.instance for other in self.supervisors if other.instance.name != instance.name]
        return replace(instance, nics=assigned(asked, instance.uid, networks, others))

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
            ResourceExhausted: it could not be stored; nothing was begun.
            Aborted: it was carried out and failed.
        """
        _refuse(check_request_id(request_id))
        outcome = await self._replayed(request_id, fingerprint)
        if not outcome:
            supervisor = self.find(name)
            if verb is not Verb.STOP or force:
                self._world.helper.check_connected()
            operation = _operation(verb, request_id, force=force, grace_s=grace_s)
            request = Request(verb, fingerprint, name, operation.id, time.time()) if request_id else None
            try:
                outcome = await supervisor.submit(operation, request)
            except (VmherdError, StoreError) as error:
                # Of two equal requests at once the second is the first one again, and none that the state forbids.
                outcome = await self._replayed(request_id, fingerprint)
                if not outcome and isinstance(error, StoreError):
                    raise _not_stored(error) from error
                if not outcome:
                    raise
        return _snapshot(outcome)

    async def pause(self, name: str) -> Snapshot:
        """Halts an instance's virtual CPUs."""
        supervisor = self.find(name)
        await supervisor.pause()
        return snapshot_of(supervisor)

    async def resume(self, name: str) -> Snapshot:
        """Lets an instance's virtual CPUs run on."""
        supervisor = self.find(name)
        await supervisor.resume()
        return snapshot_of(supervisor)

    async def update(self, name: str, *, wants_autostart: bool | None = None) -> Snapshot:
        """Changes how an instance is treated; None leaves it as it is.

        Raises:
            NotFound: no such instance.
            ResourceExhausted: it could not be stored; nothing was changed.
        """
        supervisor = self.find(name)
        if wants_autostart is not None:
            try:
                await supervisor.set_autostart(wants_autostart)
            except StoreError as error:
                raise _not_stored(error) from error
        return snapshot_of(supervisor)

    async def networks(self) -> tuple[Network, ...]:
        """The host's networks, the default first; raises `Unavailable` when the helper cannot be reached."""
        return (await self._world.helper.host()).networks

    @property
    def supervisors(self) -> Collection[Supervisor]:
        """Those of all instances there are."""
        return [supervisor for supervisor in self._supervisors.values() if not supervisor.deleted]

    @property
    def revision(self) -> int:
        """The store's revision up to which `supervisors` show every change: who watches from here misses nothing."""
        return max(self._revision, *(supervisor.revision for supervisor in self._supervisors.values()), 0)

    async def plan(self, spec: LaunchSpec) -> Plan:
        """What a launch would run; raises what the launch would raise before it makes anything."""
        _refuse(check_launch(spec))
        instance, image, host = await self._planned(spec)
        instance = self._with_nics(instance, spec.nics, host.networks)
        machine = machine_of(replace(instance, generation=1), image, self._world.state)
        return Plan(instance, await self._world.helper.plan(machine), f"{host.accelerator} ({host.why})")

    async def _planned(self, spec: LaunchSpec) -> tuple[Instance, KernelImage, Host]:
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
            why = f"must be at most the host's {host.memory_mib} MiB, is {hardware.memory_mib}"
            raise InvalidArgument.of([FieldViolation("hardware.memory_mib", why)])
        instance = Instance(
            name=spec.name,
            uid=str(uuid4()),
            image=spec.image,
            hardware=hardware,
            labels=dict(spec.labels),
            created_at_s=time.time(),
            autostart=spec.autostart,
        )
        return instance, image, host

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
        self._keep(spawn(self._supervise(supervisor), f"supervisor of {instance.name}"))
        return supervisor

    async def _supervise(self, supervisor: Supervisor) -> None:
        await supervisor.run()
        self._revision = max(self._revision, supervisor.revision)
        if self._supervisors.get(supervisor.instance.name) is supervisor:
            del self._supervisors[supervisor.instance.name]

    async def _replayed(self, request_id: str, fingerprint: str) -> Outcome | None:
        """What came of an earlier request with this id; waits for it where it is under way. None for a new one."""
        while True:
            async with self._adding:
                request = await requests.find(self._world.store, request_id, fingerprint)
            if not request:
                return None
            if request.outcome:
                return request.outcome
            with contextlib.suppress(LookupError):  # it was settled since the store was read
                return await self._supervisors[request.name].outcome(request.operation_id)

    async def _keep_house(self) -> None:
        """Forgets old requests and old changes, for the store must not grow for ever."""
        store = self._world.store
        while True:
            try:
                await requests.forget_old(store, time.time() - requests.KEPT_S)
                _, revision = await store.list(INSTANCES)
                upto = max(0, revision - REVISIONS_KEPT)
                await store.compact(upto)
            except (StoreError, ValueError) as error:
                _log.error("old requests and changes were not forgotten; trying again later", error=str(error))
            else:
                # However long no instance has changed, `List` names a revision that can still be watched from.
                self._revision = max(self._revision, upto)
            await asyncio.sleep(HOUSEKEEPING_PERIOD_S)

    def _keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _readable(entry: Entry) -> Instance:
    try:
        return decode_instance(entry.value)
    except ValueError as error:
        raise FailedPrecondition(
            f"the store's record {entry.key} cannot be read; was it written by a newer vmherd? {error}",
            reason="RECORD_NOT_READABLE",
            metadata={"key": entry.key},
        ) from error


def _operation(verb: Verb, request_id: str, *, force: bool = False, grace_s: float | None = None) -> Operation:
    return Operation(
        id=uuid4().hex, verb=verb, request_ids=(request_id,) if request_id else (), force=force, grace_s=grace_s
    )


def _refuse(violations: Iterable[FieldViolation]) -> None:
    if listed := list(violations):
        raise InvalidArgument.of(listed)


def _snapshot(outcome: Outcome) -> Snapshot:
    """The instance that a command left; raises the error that it came to."""
    if error := requests.error_of(outcome):
        raise error
    if not outcome.instance:
        raise ValueError("an outcome without error has an instance")
    return Snapshot(outcome.instance, outcome.revision)


def _not_stored(error: StoreError) -> ResourceExhausted:
    return ResourceExhausted(
        f"nothing was changed: {error}; is the disk of the state directory full?", reason="STORE_FAILED"
    )
