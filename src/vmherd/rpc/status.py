"""The errors of `vmherd.model.errors` on the wire: one table there, its inverse back.

Follows AIP-193: a `google.rpc.Status` with exactly one `ErrorInfo`, and what else fits the error.
"""

from __future__ import annotations

from datetime import timedelta

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from vmherd.model import errors
from vmherd.model.errors import FieldViolation, VmherdError

DOMAIN = "vmherd"
DETAILS_KEY = "grpc-status-details-bin"

# A status travels in HTTP/2 headers, of which gRPC takes 8 KiB in all, and much of an error's text may come from a
# client or a guest. The message stands there up to three times, once of it percent-encoded.
TEXT_MAX_BYTES = 800
VIOLATIONS_MAX = 8
VIOLATION_FIELD_MAX_BYTES = 80
VIOLATION_DESCRIPTION_MAX_BYTES = 240

CODES: dict[type[VmherdError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

ERRORS = {code: kind for kind, code in CODES.items()}


def number_of(code: grpc.StatusCode) -> int:
    """The code's number in `google.rpc.Code`."""
    number: int = code.value[0]
    return number


def to_status(error: VmherdError) -> status_pb2.Status:
    """The error as a `google.rpc.Status`, its texts cut where they are too long for the wire."""
    code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
    message = _cut(error.message)
    metadata = {key: _cut(value) for key, value in error.metadata.items()}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if isinstance(error, errors.InvalidArgument) and error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=_cut(v.field, VIOLATION_FIELD_MAX_BYTES),
                        description=_cut(v.description, VIOLATION_DESCRIPTION_MAX_BYTES),
                    )
                    for v in error.violations[:VIOLATIONS_MAX]
                ]
            )
        )
    if isinstance(error, errors.FailedPrecondition):
        violation = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, subject=metadata.get("name", ""), description=message
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[violation]))
    if isinstance(error, errors.NotFound | errors.AlreadyExists) and "name" in metadata:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=f"{DOMAIN}/{metadata.get('type', 'instance')}",
                resource_name=metadata["name"],
                description=message,
            )
        )
    if isinstance(error, errors.Unavailable):
        delay = duration_pb2.Duration()
        delay.FromTimedelta(timedelta(seconds=error.retry_delay_s))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=number_of(code), message=message, details=[_pack(d) for d in details])


def _cut(text: str, max_bytes: int = TEXT_MAX_BYTES) -> str:
    """As much of the text as fits. Protobuf takes no half of a surrogate pair, and a file name may hold one."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - len("…".encode())].decode("utf-8", "ignore") + "…"


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def status_of(call: grpc.aio.AioRpcError | grpc.Call) -> status_pb2.Status:
    """The status that a failed call carries; made up from code and text where the peer is not vmherd."""
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status(code=number_of(call.code()), message=call.details() or "")


def from_status(status: status_pb2.Status) -> VmherdError:
    """The error that a status stands for, with its reason, metadata, violations and delay."""
    code = next((code for code in grpc.StatusCode if number_of(code) == status.code), grpc.StatusCode.UNKNOWN)
    kind = ERRORS.get(code, errors.InternalError)
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for packed in status.details:
        for message in (info, bad_request, retry):
            packed.Unpack(message)
    reason = info.reason or code.name
    if kind is errors.InvalidArgument:
        return errors.InvalidArgument(
            status.message,
            reason=reason,
            metadata=info.metadata,
            violations=[FieldViolation(v.field, v.description) for v in bad_request.field_violations],
        )
    if kind is errors.Unavailable:
        delay_s = retry.retry_delay.ToTimedelta().total_seconds()
        return errors.Unavailable(status.message, reason=reason, metadata=info.metadata, retry_delay_s=delay_s or 1.0)
    return kind(status.message, reason=reason, metadata=info.metadata)


def from_rpc_error(error: grpc.aio.AioRpcError | grpc.Call) -> VmherdError:
    """The error that a failed call stands for."""
    return from_status(status_of(error))
