"""Commands that are carried out exactly once: what came of each request id, kept beside the instances."""

from __future__ import annotations

from dataclasses import replace

from google.protobuf import json_format
from google.rpc import status_pb2

from vmherd.controller.records import REQUESTS, Outcome, Request, decode_request, encode_request, request_key
from vmherd.controller.store import Compare, Put, Store
from vmherd.controller.store.base import PUTS_MAX
from vmherd.model.errors import Aborted, InvalidArgument, VmherdError
from vmherd.model.instance import Operation
from vmherd.rpc.status import from_status, to_status

KEPT_S = 24 * 3600.0
"""How long the outcome of a request is kept for those who ask again."""


async def find(store: Store, request_id: str, fingerprint: str) -> Request | None:
    """The earlier request with this id, with its outcome if it has come to one; None for a new id.

    Raises:
        InvalidArgument: the id was used for another request.
    """
    entry = await store.get(request_key(request_id)) if request_id else None
    if not entry:
        return None
    request = decode_request(entry.value)
    if request.fingerprint != fingerprint:
        raise InvalidArgument(
            f"request_id {request_id!r} was used for another request; take a new one for every request",
            reason="REQUEST_ID_REUSED",
            metadata={"request_id": request_id},
        )
    if request.outcome:
        return replace(request, outcome=replace(request.outcome, revision=entry.mod_revision))
    return request


def beginning(request_id: str, request: Request) -> tuple[Put, Compare]:
    """What stores a request at the moment it is accepted, if its id is still new then."""
    key = request_key(request_id)
    return Put(key, encode_request(request)), Compare(key, 0)


def failed(error: VmherdError) -> Outcome:
    """What an operation came to that failed."""
    return Outcome(error=json_format.MessageToJson(to_status(error), indent=None))


def error_of(outcome: Outcome) -> VmherdError | None:
    """The error that an operation came to."""
    return from_status(json_format.Parse(outcome.error, status_pb2.Status())) if outcome.error else None


def superseded(by: Operation) -> Outcome:
    """What an operation came to that another one put an end to."""
    return failed(Aborted(f"a {by.verb} came in between", reason="SUPERSEDED", metadata={"by": by.verb}))


async def ending(store: Store, operation: Operation, outcome: Outcome) -> list[Put]:
    """What stores the outcome of an operation for all who asked for it with a request id."""
    entries = [await store.get(request_key(request_id)) for request_id in operation.request_ids]
    return [
        Put(entry.key, encode_request(replace(decode_request(entry.value), outcome=outcome)))
        for entry in entries
        if entry
    ]


async def forget_old(store: Store, before_s: float) -> None:
    """Removes the requests that were accepted before this time and have come to their end, after which none changes."""
    entries, _ = await store.list(REQUESTS)
    for start in range(0, len(entries), PUTS_MAX):
        batch = entries[start : start + PUTS_MAX]
        await store.transact([Put(entry.key, None) for entry in batch if _ended(decode_request(entry.value), before_s)])


def _ended(request: Request, before_s: float) -> bool:
    return request.outcome is not None and request.accepted_at_s < before_s
