from __future__ import annotations

from vmherd.cli.exit_codes import CODES, FAILED, MEANINGS, exit_code
from vmherd.model import errors
from vmherd.rpc.status import ERRORS


def test_every_error_has_a_documented_code() -> None:
    for kind in ERRORS.values():
        assert exit_code(kind("why")) in MEANINGS


def test_codes_are_the_documented_ones() -> None:
    assert {kind.__name__: code for kind, code in CODES.items()} == {
        "InvalidArgument": 2,
        "OutOfRange": 2,
        "NotFound": 3,
        "AlreadyExists": 4,
        "FailedPrecondition": 4,
        "ResourceExhausted": 4,
        "Unavailable": 5,
        "DeadlineExceeded": 6,
        "Unauthenticated": 7,
        "PermissionDenied": 7,
    }


def test_an_error_without_a_code_of_its_own_is_a_failure() -> None:
    assert exit_code(errors.Aborted("why")) == FAILED
