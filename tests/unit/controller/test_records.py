from __future__ import annotations

import pytest

from vmherd.controller.records import Outcome, Request, decode_instance, decode_request, encode_instance, encode_request
from vmherd.model.instance import Address, Cause, Exit, Hardware, Instance, Operation, StopStep, Verb, started
from vmherd.model.lifecycle import State
from vmherd.model.readiness import Readiness, Rung

FULL = Instance(
    name="web",
    uid="uid",
    image="builtin",
    hardware=Hardware(2, 256),
    labels={"a": "b"},
    created_at_s=1.25,
    state=State.STOPPING,
    generation=3,
    accepted_at_s=2.5,
    readiness=Readiness().climb(Rung.PROCESS, now_s=3, accepted_at_s=2.5),
    addresses=(Address("10.0.2.15", 24, "52:00:00:00:00:01", "eth0"),),
    last_exit=Exit(Cause.STOPPED, "detail", 9.0, StopStep.QUIT, 0, None, "tail"),
    operation=Operation("id", Verb.STOP, ("r1", "r2"), True, 2.5),
)


@pytest.mark.parametrize("instance", [FULL, Instance("a", "u", "builtin", Hardware(1, 32), {}, 0.0)])
def test_an_instance_survives_the_store(instance: Instance) -> None:
    assert decode_instance(encode_instance(instance)) == instance


@pytest.mark.parametrize("outcome", [None, Outcome(FULL), Outcome(error='{"code": 9}')])
def test_a_request_survives_the_store(outcome: Outcome | None) -> None:
    request = Request(Verb.STOP, "print", "web", "id", 1.5, outcome)
    assert decode_request(encode_request(request)) == request


@pytest.mark.parametrize("value", [b"", b"{}", b'{"name": 1}', b"\xff"])
def test_what_is_no_record_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"validation error|Invalid JSON"):
        decode_instance(value)


def test_a_start_begins_anew_and_keeps_the_last_exit() -> None:
    instance = started(decode_instance(encode_instance(FULL)), 20.0)
    assert (instance.generation, instance.accepted_at_s) == (4, 20.0)
    assert (instance.readiness, instance.addresses) == (Readiness(), ())
    assert instance.last_exit == FULL.last_exit
