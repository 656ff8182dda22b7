"""What the controller keeps in its store: instances, and requests that are to be carried out exactly once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter

from vmherd.model.instance import Instance, NetworkInterface, Verb
from vmherd.model.machine import mac_of
from vmherd.model.network import USER_NETWORK

INSTANCES = "instances/"
REQUESTS = "requests/"


def _of_an_earlier_version(record: Any) -> Any:
    """Before a record had `nics`, every instance had one, on QEMU's own network."""
    if not isinstance(record, dict) or "nics" in record:
        return record
    return record | {"nics": [asdict(NetworkInterface(USER_NETWORK, mac_of(str(record.get("uid")))))]}


_AnyInstance = Annotated[Instance, BeforeValidator(_of_an_earlier_version)]


@dataclass(frozen=True)
class Outcome:
    """What a command came to: the instance as it was then, or an error."""

    instance: _AnyInstance | None = None
    error: str = ""
    """A `google.rpc.Status` in JSON."""
    revision: int = 0
    """The store's revision of this outcome; 0 inside the store, where the record itself has it."""


@dataclass(frozen=True)
class Request:
    """A command with a request id."""

    verb: Verb
    fingerprint: str
    """Tells the same request from another one with the same id."""
    name: str
    operation_id: str
    accepted_at_s: float
    outcome: Outcome | None = None
    """None while it is being carried out."""


_INSTANCE = TypeAdapter[Instance](_AnyInstance)
_REQUEST = TypeAdapter(Request)


def instance_key(name: str) -> str:
    """The key of an instance's record."""
    return INSTANCES + name


def request_key(request_id: str) -> str:
    """The key of a request's record."""
    return REQUESTS + request_id


def encode_instance(instance: Instance) -> bytes:
    """The record's bytes."""
    return _INSTANCE.dump_json(instance)


def decode_instance(value: bytes) -> Instance:
    """The record from its bytes; raises `ValueError` when they are none."""
    return _INSTANCE.validate_json(value)


def encode_request(request: Request) -> bytes:
    """The record's bytes."""
    return _REQUEST.dump_json(request)


def decode_request(value: bytes) -> Request:
    """The record from its bytes; raises `ValueError` when they are none."""
    return _REQUEST.validate_json(value)
