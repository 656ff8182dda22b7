"""What the command line's exit codes mean."""

from __future__ import annotations

from types import MappingProxyType

from vmherd.model import errors
from vmherd.model.errors import VmherdError

OK = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
STATE = 4
UNAVAILABLE = 5
TIMEOUT = 6
DENIED = 7
INTERRUPTED = 130
"""128 and SIGINT, as shells have it."""

MEANINGS = MappingProxyType(
    {
        OK: "done",
        FAILED: "failed for a reason without a code of its own",
        USAGE: "wrong use: an option, a settings file or a value in a request",
        NOT_FOUND: "no such instance, or no such file",
        STATE: "the state of things forbids it, for instance a name that is taken",
        UNAVAILABLE: "somebody who is needed cannot be reached",
        TIMEOUT: "time was up first",
        DENIED: "not allowed",
        INTERRUPTED: "interrupted with Ctrl-C",
    }
)

CODES: MappingProxyType[type[VmherdError], int] = MappingProxyType(
    {
        errors.InvalidArgument: USAGE,
        errors.OutOfRange: USAGE,
        errors.NotFound: NOT_FOUND,
        errors.AlreadyExists: STATE,
        errors.FailedPrecondition: STATE,
        errors.ResourceExhausted: STATE,
        errors.Unavailable: UNAVAILABLE,
        errors.DeadlineExceeded: TIMEOUT,
        errors.Unauthenticated: DENIED,
        errors.PermissionDenied: DENIED,
    }
)


def exit_code(error: VmherdError) -> int:
    """The exit code for an error."""
    return CODES.get(type(error), FAILED)
