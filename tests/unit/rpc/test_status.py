"""Errors over the wire and back."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from vmherd.model import errors
from vmherd.model.errors import FieldViolation, VmherdError
from vmherd.rpc.status import CODES, from_status, to_status

ALL = [
    errors.InvalidArgument.of([FieldViolation("hardware.cpus", "must be at least 1")]),
    errors.OutOfRange("old"),
    errors.instance_not_found("web"),
    errors.name_taken("web"),
    errors.Unauthenticated("who?"),
    errors.PermissionDenied("no"),
    errors.Unimplemented("cannot"),
    errors.illegal_transition("web", "start", "RUNNING", ["STOPPED"]),
    errors.ResourceExhausted("full"),
    errors.Aborted("failed", reason="START_FAILED", metadata={"name": "web"}),
    errors.Unavailable("later", retry_delay_s=2.5),
    errors.DeadlineExceeded("slow"),
    errors.InternalError("defect", metadata={"incident_id": "1"}),
]


def test_every_kind_of_error_has_a_code_of_its_own() -> None:
    assert {type(error) for error in ALL} == set(CODES) == set(VmherdError.__subclasses__())
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_there_and_back(error: VmherdError) -> None:
    back = from_status(to_status(error))
    assert type(back) is type(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_exactly_one_error_info(error: VmherdError) -> None:
    infos = [detail for detail in to_status(error).details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    info = error_details_pb2.ErrorInfo()
    assert [packed.Unpack(info) for packed in infos] == [True]
    assert (info.domain, info.reason) == ("vmherd", error.reason)


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (ALL[0], error_details_pb2.BadRequest),
        (ALL[2], error_details_pb2.ResourceInfo),
        (ALL[3], error_details_pb2.ResourceInfo),
        (ALL[7], error_details_pb2.PreconditionFailure),
        (ALL[10], error_details_pb2.RetryInfo),
    ],
)
def test_details_that_fit(error: VmherdError, detail: type) -> None:
    assert any(packed.Is(detail.DESCRIPTOR) for packed in to_status(error).details)


@pytest.mark.parametrize("text", ["a" * 100_000, "ä" * 100_000, "\N{FIRE}" * 100_000], ids=["1", "2", "4"])
@pytest.mark.parametrize("kind", list(CODES))
def test_a_long_text_is_cut_between_characters(kind: type[VmherdError], text: str) -> None:
    back = from_status(to_status(kind(text, reason="LONG", metadata={"name": text, "other": "short"})))
    assert (type(back), back.reason, back.metadata["other"]) == (kind, "LONG", "short")
    for cut in (back.message, back.metadata["name"]):
        assert cut.endswith("…")
        assert text.startswith(cut.removesuffix("…"))
        assert 790 < len(cut.encode()) <= 800


def test_as_many_violations_as_fit_are_told() -> None:
    many = [FieldViolation(f"labels[{number}]" * 100, "is wrong " * 100) for number in range(100)]
    back = from_status(to_status(errors.InvalidArgument.of(many)))
    assert isinstance(back, errors.InvalidArgument)
    assert len(back.violations) == 8
    assert all(len(it.field.encode()) <= 80 and len(it.description.encode()) <= 240 for it in back.violations)


def test_half_of_a_surrogate_pair_is_no_reason_to_fail() -> None:
    name = b"\xff".decode("utf-8", "surrogateescape")
    back = from_status(to_status(errors.NotFound(f"no file {name}", metadata={"name": name})))
    assert (back.message, back.metadata) == ("no file ?", {"name": "?"})


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_any_peer_s_status_becomes_an_error(code: grpc.StatusCode) -> None:
    error = from_status(status_pb2.Status(code=code.value[0], message="text"))
    assert (error.message, error.reason) == ("text", code.name)
