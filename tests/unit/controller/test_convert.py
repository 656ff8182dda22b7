"""Between the messages of the public API and the model."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from vmherd.api.v1 import instance_pb2
from vmherd.api.v1.controller_pb2 import LaunchRequest, StartRequest, StopRequest, WaitRequest
from vmherd.api.v1.instance_pb2 import Hardware
from vmherd.controller import convert
from vmherd.controller.views import Snapshot
from vmherd.model import instance as model
from vmherd.model.errors import InvalidArgument
from vmherd.model.instance import Cause, Exit, LaunchSpec, StopStep
from vmherd.model.lifecycle import State
from vmherd.model.readiness import Rung


def test_the_enums_of_the_api_have_the_names_of_the_model() -> None:
    unset = {"STATE_UNSPECIFIED", "CAUSE_UNSPECIFIED", "STOP_STEP_UNSPECIFIED"}
    pairs: list[tuple[Any, Any]] = [
        (State, instance_pb2.Instance.State),
        (Cause, instance_pb2.Exit.Cause),
        (StopStep, instance_pb2.Exit.StopStep),
    ]
    for ours, theirs in pairs:
        assert {member.name for member in ours} == set(theirs.keys()) - unset


def test_what_a_launch_does_not_say_is_left_open() -> None:
    assert convert.launch_spec(LaunchRequest(name="web")) == LaunchSpec("web")
    said = LaunchRequest(name="web", image="x", hardware=Hardware(cpus=0, memory_mib=0), start=False)
    assert convert.launch_spec(said) == LaunchSpec("web", "x", 0, 0, start=False)


@pytest.mark.parametrize("until", [0, 1, 2, 3, 4])
def test_conditions_that_are_rungs(until: Any) -> None:
    assert convert.rung_of(until) is (Rung(until) if until else Rung.AGENT)


def test_the_condition_that_is_the_end() -> None:
    assert convert.rung_of(WaitRequest.STOPPED) is None


@pytest.mark.parametrize("until", [6, 99, -1])
def test_a_condition_that_there_is_not(until: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"until: must be one of PROCESS, .*STOPPED, is {until}"):
        convert.rung_of(until)


@pytest.mark.parametrize(
    ("duration", "value_s"),
    [(None, 120.0), (Duration(), 0.0), (Duration(seconds=86400), 86400.0), (Duration(nanos=500_000_000), 0.5)],
)
def test_seconds(duration: Duration | None, value_s: float) -> None:
    assert convert.seconds(WaitRequest(timeout=duration), "timeout", default_s=120.0) == value_s


@pytest.mark.parametrize(
    "duration", [Duration(seconds=-1), Duration(nanos=-1), Duration(seconds=86401), Duration(seconds=2**62)]
)
def test_seconds_out_of_bounds(duration: Duration) -> None:
    with pytest.raises(InvalidArgument, match="timeout: must be from 0 s to 86400 s"):
        convert.seconds(WaitRequest(timeout=duration), "timeout", default_s=120.0)


def test_a_fingerprint_tells_what_is_asked_for_and_not_with_which_id() -> None:
    labels = {str(number): "" for number in range(20)}
    same = [
        LaunchRequest(name="web", labels=labels, request_id="a"),
        LaunchRequest(name="web", labels=dict(reversed(labels.items())), request_id="b"),
    ]
    others = [LaunchRequest(name="web"), StartRequest(name="web"), StopRequest(name="web")]
    assert len({convert.fingerprint(request) for request in same}) == 1
    assert len({convert.fingerprint(request) for request in same + others}) == 4


def test_how_a_process_ended() -> None:
    exit_ = Exit(Cause.STOPPED, "QEMU quit", ended_at_s=1.5, stop_step=StopStep.QUIT, exit_code=0)
    instance = model.Instance("web", "uid", "builtin", model.Hardware(1, 128), {}, 0.0, last_exit=exit_)
    message = convert.instance_message(Snapshot(instance, 7))
    assert (message.revision, message.last_exit.stop_step) == (7, message.last_exit.QUIT)
    assert message.last_exit.end_time.ToNanoseconds() == 1_500_000_000
    assert message.last_exit.HasField("exit_code")
    assert not message.last_exit.HasField("signal")
