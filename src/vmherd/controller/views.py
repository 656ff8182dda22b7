"""What can be seen of the instances: pages of them, the way to a readiness, and every change."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from enum import StrEnum

from vmherd.controller.exits import short_tail
from vmherd.controller.records import INSTANCES, decode_instance
from vmherd.controller.store import Compacted, Store
from vmherd.controller.supervisor import Supervisor
from vmherd.model.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    OutOfRange,
    instance_not_found,
)
from vmherd.model.instance import Instance
from vmherd.model.lifecycle import State
from vmherd.model.names import LABELS_MAX, check_name
from vmherd.model.readiness import WAITING_FOR, Rung

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000

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


def snapshot_of(supervisor: Supervisor) -> Snapshot:
    """The instance as it is now."""
    return Snapshot(supervisor.instance, supervisor.revision)


def page_of(
    supervisors: Iterable[Supervisor], revision: int, *, page_size: int, page_token: str, label_selector: Iterable[str]
) -> Page:
    """A page of instances, from memory.

    Raises:
        InvalidArgument: the token is none, or the selectors are.
    """
    after = _name_of_token(page_token)
    wanted = [selector.partition("=") for selector in label_selector]
    if len(wanted) > LABELS_MAX or not all(key for key, _, _ in wanted):
        raise InvalidArgument.of(
            [FieldViolation("label_selector", f"must be at most {LABELS_MAX}, each `key` or `key=value`")]
        )
    size = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
    matching = [
        supervisor
        for supervisor in sorted(supervisors, key=lambda supervisor: supervisor.instance.name)
        if supervisor.instance.name > after and _has_labels(supervisor.instance, wanted)
    ]
    page = tuple(snapshot_of(supervisor) for supervisor in matching[:size])
    token = _token_of_name(page[-1].instance.name) if len(matching) > size else ""
    return Page(page, token, revision)


async def wait(supervisor: Supervisor, until: Rung | None, timeout_s: float) -> AsyncIterator[Progress]:
    """Tells how an instance comes along until it reaches a rung; with None, until it is stopped or failed.

    Raises:
        NotFound: it was deleted meanwhile.
        FailedPrecondition: it cannot come true any more, as the instance does not run or has no network interface.
        DeadlineExceeded: time is up.
    """
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    name = supervisor.instance.name
    while not supervisor.deleted:
        changed, instance = supervisor.changed, supervisor.instance
        waiting_for = _waiting_for(instance, until)
        yield Progress(snapshot_of(supervisor), waiting_for)
        if not waiting_for:
            return
        if until and instance.state in DEAD_STATES and not instance.operation:
            raise _never(instance, until)
        if until is Rung.ADDRESS and not instance.nics:
            raise _no_interface(instance)
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


async def watch(store: Store, from_revision: int, name: str) -> AsyncIterator[InstanceChange]:
    """Every change of every instance, or of one, after a revision; from 0 on also how they are now.

    Raises:
        InvalidArgument: no instance can have this name.
        OutOfRange: the revision is older than the log, or has not been yet.
    """
    if name and (violations := list(check_name(name))):
        raise InvalidArgument.of(violations)
    entries, revision = await store.list(INSTANCES)
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
        async for change in store.watch(INSTANCES, from_revision or revision):
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


def _waiting_for(instance: Instance, until: Rung | None) -> str:
    """What has to come true next; empty when all of it has."""
    if until is None:
        return "" if instance.state in DEAD_STATES and not instance.operation else "the instance to end"
    if instance.readiness.has(until):
        return ""
    # On a network of the host an address may come before the agent.
    unneeded = {Rung.AGENT} if until is Rung.ADDRESS and instance.on_bridge else set()
    return next(WAITING_FOR[rung] for rung in Rung if not instance.readiness.has(rung) and rung not in unneeded)


def _no_interface(instance: Instance) -> FailedPrecondition:
    return FailedPrecondition(
        f"{instance.name!r} has no network interface and will not reach {Rung.ADDRESS.name}",
        reason="NO_NETWORK_INTERFACE",
        metadata={"name": instance.name},
    )


def _never(instance: Instance, until: Rung) -> FailedPrecondition:
    exit_ = instance.last_exit
    why = f": {exit_.detail}" if exit_ else ""
    return FailedPrecondition(
        f"{instance.name!r} is {instance.state} and will not reach {until.name}{why}",
        reason="INSTANCE_FAILED" if instance.state is State.FAILED else "INSTANCE_STOPPED",
        metadata={"name": instance.name, "state": instance.state}
        | ({"cause": exit_.cause, "stderr_tail": short_tail(exit_.stderr_tail)} if exit_ else {}),
    )


def _has_labels(instance: Instance, wanted: Iterable[tuple[str, str, str]]) -> bool:
    return all(
        key in instance.labels and (not equals or instance.labels[key] == value) for key, equals, value in wanted
    )


def _token_of_name(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _name_of_token(token: str) -> str:
    if not token:
        return ""
    with contextlib.suppress(ValueError):
        name = base64.b64decode(token, altchars=b"-_", validate=True).decode()
        if not any(check_name(name)):
            return name
    raise InvalidArgument.of([FieldViolation("page_token", "must be the next_page_token of an earlier page")])
