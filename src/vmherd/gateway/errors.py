"""Errors over HTTP: the body is a `google.rpc.Status` in JSON, the HTTP code follows grpc-gateway."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from starlette.responses import Response

from vmherd.rpc.status import number_of

HTTP_CODES = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
"""grpc-gateway's table, in the order of the codes' numbers."""

HTTP_CODES_OF_REASONS = {
    "METHOD_NOT_ALLOWED": 405,
    "BODY_TOO_SLOW": 408,
    "BODY_TOO_LARGE": 413,
    "MEDIA_TYPE_NOT_SUPPORTED": 415,
}
"""What only HTTP can refuse has a code of its own."""

_HTTP_CODES_OF_NUMBERS = {number_of(code): http_code for code, http_code in HTTP_CODES.items()}
_INTERNAL_SERVER_ERROR = 500
_UNAUTHORIZED = 401


def error_response(status: Status, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP answer for a status."""
    value = _value(status)
    details = {detail.get("@type"): detail for detail in value["details"]}
    reason = details.get(_type_url(ErrorInfo), {}).get("reason")
    http_code = HTTP_CODES_OF_REASONS.get(reason) or _HTTP_CODES_OF_NUMBERS.get(status.code, _INTERNAL_SERVER_ERROR)
    all_headers = dict(headers or {})
    if retry := details.get(_type_url(RetryInfo)):
        all_headers["Retry-After"] = str(math.ceil(float(retry["retryDelay"].removesuffix("s"))))
    if http_code == _UNAUTHORIZED:
        all_headers["WWW-Authenticate"] = 'Bearer realm="vmherd"'
    return Response(_text(value), http_code, all_headers, "application/json")


def status_json(status: Status) -> str:
    """The status in one line of canonical JSON, its details unpacked."""
    return _text(_value(status))


def _value(status: Status) -> dict[str, Any]:
    return {"code": status.code, "message": status.message, "details": [_detail(it) for it in status.details]}


def _detail(packed: AnyMessage) -> dict[str, Any]:
    try:
        return json_format.MessageToDict(packed, always_print_fields_with_no_presence=True)
    except (TypeError, ValueError, DecodeError):  # a type that nobody here knows, or a value that is not of it
        return {"@type": packed.type_url, "value": base64.b64encode(packed.value).decode()}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _type_url(kind: type[Message]) -> str:
    return f"type.googleapis.com/{kind.DESCRIPTOR.full_name}"
