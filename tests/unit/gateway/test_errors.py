"""Statuses as HTTP answers."""

from __future__ import annotations

import json
from datetime import timedelta

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import DebugInfo, RetryInfo
from google.rpc.status_pb2 import Status

from vmherd.gateway.errors import HTTP_CODES, HTTP_CODES_OF_REASONS, error_response, status_json
from vmherd.model.errors import FieldViolation, InvalidArgument, Unauthenticated, Unavailable
from vmherd.rpc.status import number_of, to_status


@pytest.mark.parametrize(
    ("code", "http_code"),
    [
        (code_pb2.CANCELLED, 499),
        (code_pb2.UNKNOWN, 500),
        (code_pb2.INVALID_ARGUMENT, 400),
        (code_pb2.DEADLINE_EXCEEDED, 504),
        (code_pb2.NOT_FOUND, 404),
        (code_pb2.ALREADY_EXISTS, 409),
        (code_pb2.PERMISSION_DENIED, 403),
        (code_pb2.RESOURCE_EXHAUSTED, 429),
        (code_pb2.FAILED_PRECONDITION, 400),
        (code_pb2.ABORTED, 409),
        (code_pb2.OUT_OF_RANGE, 400),
        (code_pb2.UNIMPLEMENTED, 501),
        (code_pb2.INTERNAL, 500),
        (code_pb2.UNAVAILABLE, 503),
        (code_pb2.DATA_LOSS, 500),
        (code_pb2.UNAUTHENTICATED, 401),
        (77, 500),
    ],
)
def test_http_codes_are_those_of_grpc_gateway(code: int, http_code: int) -> None:
    assert error_response(Status(code=code, message="no")).status_code == http_code


def test_the_table_is_whole() -> None:
    assert [number_of(code) for code in HTTP_CODES] == sorted(code_pb2.Code.values())
    assert set(HTTP_CODES) == set(grpc.StatusCode)


@pytest.mark.parametrize(("reason", "http_code"), HTTP_CODES_OF_REASONS.items())
def test_what_only_http_can_refuse_has_its_own_code(reason: str, http_code: int) -> None:
    assert error_response(to_status(InvalidArgument("no", reason=reason))).status_code == http_code


def test_the_body_is_canonical_json_with_the_details_unpacked() -> None:
    error = InvalidArgument.of([FieldViolation("hardware.cpus", "must be at least 1 (é)")])
    response = error_response(to_status(error))
    assert response.headers["content-type"] == "application/json"
    assert json.loads(response.body) == {
        "code": 3,
        "message": "hardware.cpus: must be at least 1 (é)",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "INVALID_ARGUMENT",
                "domain": "vmherd",
                "metadata": {},
            },
            {
                "@type": "type.googleapis.com/google.rpc.BadRequest",
                "fieldViolations": [
                    {"field": "hardware.cpus", "description": "must be at least 1 (é)", "reason": ""},
                ],
            },
        ],
    }


def test_details_that_nobody_can_read_are_passed_on_as_bytes() -> None:
    unknown = AnyMessage(type_url="type.googleapis.com/some.where.Else", value=b"\x01")
    broken = AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    value = json.loads(status_json(Status(code=13, details=[unknown, broken])))
    assert value["details"] == [
        {"@type": "type.googleapis.com/some.where.Else", "value": "AQ=="},
        {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "value": "/w=="},
    ]


@pytest.mark.parametrize(("delay_s", "header"), [(1.0, "1"), (0.2, "1"), (2.5, "3")])
def test_a_retry_delay_is_a_header_in_whole_seconds(delay_s: float, header: str) -> None:
    response = error_response(to_status(Unavailable("later", retry_delay_s=delay_s)))
    assert response.headers["retry-after"] == header


def test_other_details_make_no_header() -> None:
    status = Status(code=13)
    status.details.add().Pack(DebugInfo(detail="x"))
    assert "retry-after" not in error_response(status).headers


def test_who_is_not_known_is_told_how_to_say_it() -> None:
    response = error_response(to_status(Unauthenticated("who?")), {"X-Other": "kept"})
    assert response.headers["www-authenticate"] == 'Bearer realm="vmherd"'
    assert response.headers["x-other"] == "kept"


def test_a_retry_delay_of_days() -> None:
    delay = Duration()
    delay.FromTimedelta(timedelta(days=2))
    status = Status(code=8)
    status.details.add().Pack(RetryInfo(retry_delay=delay))
    assert error_response(status).headers["retry-after"] == "172800"
