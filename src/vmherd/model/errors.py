"""The errors of vmherd, ordered by what the one who gets them can do.

::

    VmherdError
     ├── InvalidArgument       change the request
     ├── OutOfRange            change the request: the range it names is gone
     ├── NotFound              name something that exists
     ├── AlreadyExists         take another name
     ├── Unauthenticated       say who you are
     ├── PermissionDenied      ask somebody who may
     ├── Unimplemented         do without: this one cannot do it
     ├── FailedPrecondition    change the state of the thing first
     ├── ResourceExhausted     free something first
     ├── Aborted               it was carried out and failed; look at why
     ├── Unavailable           try again later, as it is
     ├── DeadlineExceeded      allow more time
     └── InternalError         report it, with its incident id

Each has a code of gRPC (`vmherd.rpc.status` has the table), a `reason` that programs can match, and `metadata` with
the values that its message names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


class VmherdError(Exception):
    """An error with a reason for programs and a message for people."""

    reason = "UNSPECIFIED"

    def __init__(
        self, message: str, *, reason: str | None = None, metadata: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}


@dataclass(frozen=True)
class FieldViolation:
    """One thing wrong with one field of a request."""

    field: str
    description: str


class InvalidArgument(VmherdError):
    """The request is wrong, whatever the state of the system."""

    reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, object] | None = None,
        violations: Iterable[FieldViolation] = (),
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = tuple(violations)

    @classmethod
    def of(cls, violations: Iterable[FieldViolation]) -> InvalidArgument:
        """The error for one or more wrong fields."""
        listed = tuple(violations)
        return cls("; ".join(f"{v.field}: {v.description}" for v in listed), violations=listed)


class OutOfRange(VmherdError):
    """The request names a range that is no longer there."""

    reason = "OUT_OF_RANGE"


class NotFound(VmherdError):
    """There is no such thing."""

    reason = "NOT_FOUND"


class AlreadyExists(VmherdError):
    """There is such a thing already."""

    reason = "ALREADY_EXISTS"


class Unauthenticated(VmherdError):
    """The caller did not show who it is."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(VmherdError):
    """The caller may not do this, or the guest's admin forbids it."""

    reason = "PERMISSION_DENIED"


class Unimplemented(VmherdError):
    """The one who was asked does not know how."""

    reason = "UNIMPLEMENTED"


class FailedPrecondition(VmherdError):
    """The state of the thing forbids it."""

    reason = "FAILED_PRECONDITION"


class ResourceExhausted(VmherdError):
    """There is no more of something."""

    reason = "RESOURCE_EXHAUSTED"


class Aborted(VmherdError):
    """It was carried out and failed."""

    reason = "ABORTED"


class Unavailable(VmherdError):
    """Somebody who is needed cannot be reached right now."""

    reason = "UNAVAILABLE"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, object] | None = None,
        retry_delay_s: float = 1.0,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_delay_s = retry_delay_s


class DeadlineExceeded(VmherdError):
    """Time was up first."""

    reason = "DEADLINE_EXCEEDED"


class InternalError(VmherdError):
    """A defect of vmherd. The log has the details under the incident id in `metadata`."""

    reason = "INTERNAL"


def instance_not_found(name: str) -> NotFound:
    """No instance has this name."""
    return NotFound(
        f"no instance is called {name!r}; `vmherd list` shows those that exist",
        reason="INSTANCE_NOT_FOUND",
        metadata={"name": name},
    )


def name_taken(name: str) -> AlreadyExists:
    """An instance has this name already."""
    return AlreadyExists(
        f"an instance called {name!r} exists already; delete it first or take another name",
        reason="INSTANCE_NAME_TAKEN",
        metadata={"name": name},
    )


def agent_out_of_reach(name: str, state: str, legal: Iterable[str]) -> FailedPrecondition:
    """The instance's state keeps its agent from being asked."""
    allowed = ", ".join(sorted(legal))
    return FailedPrecondition(
        f"cannot ask the guest agent of {name!r}: it is {state}; its agent can be asked when it is {allowed}",
        reason="ILLEGAL_STATE",
        metadata={"name": name, "state": state, "legal_states": allowed},
    )


def illegal_transition(name: str, verb: str, state: str, legal: Iterable[str]) -> FailedPrecondition:
    """The instance's state forbids the verb."""
    allowed = ", ".join(sorted(legal)) or "no state"
    return FailedPrecondition(
        f"cannot {verb} {name!r}: it is {state}; {verb} is possible when it is {allowed}",
        reason="ILLEGAL_STATE",
        metadata={"name": name, "state": state, "verb": verb, "legal_states": allowed},
    )
