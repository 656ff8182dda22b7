"""Between the messages of the public API and the model."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from vmherd.api.v1 import controller_pb2, instance_pb2
from vmherd.api.v1.controller_pb2 import LaunchRequest, StartRequest, StopRequest, WaitRequest
from vmherd.api.v1.instance_pb2 import Hardware
from vmherd.controller import convert
from vmherd.controller.views import Snapshot
from vmherd.model import instance as model
from vmherd.model.errors import InvalidArgument
from vmherd.model.instance import Address, Cause, Exit, LaunchSpec, NetworkInterface, Source, StopStep
from vmherd.model.lifecycle import State
from vmherd.model.machine import PortForward, Protocol
from vmherd.model.network import Network
from vmherd.model.readiness import Readiness, Rung


def test_the_enums_of_the_api_have_the_names_of_the_model() -> None:
    pairs: list[tuple[Any, Any]] = [
        (Source, instance_pb2.Address.Source),
        (Protocol, instance_pb2.PortForward.Protocol),
        (Rung, instance_pb2.Readiness.Rung),
        (State, instance_pb2.Instance.State),
        (Cause, instance_pb2.Exit.Cause),
        (StopStep, instance_pb2.Exit.StopStep),
    ]
    for ours, theirs in pairs:
        unset, *names = theirs.keys()
        assert unset.endswith("_UNSPECIFIED")
        assert {member.name for member in ours} == set(names)


def test_what_a_launch_does_not_say_is_left_open() -> None:
    assert convert.launch_spec(LaunchRequest(name="web")) == LaunchSpec("web")
    said = LaunchRequest(name="web", image="x", hardware=Hardware(cpus=0, memory_mib=0), start=False)
    assert convert.launch_spec(said) == LaunchSpec("web", "x", 0, 0, start=False)


def test_network_interfaces_are_taken_as_they_are_asked_for() -> None:
    forwards = [{"guest_port": 22}, {"guest_port": 53, "host_port": 5300, "protocol": "UDP"}]
    request = LaunchRequest(name="web", autostart=True)
    request.nics.add(mac="52:00:00:00:00:AA", ipv4_address="10.20.0.9", ipv6_address="fd00::1")
    request.nics.add(network="user", forwards=forwards)
    assert convert.launch_spec(request) == LaunchSpec(
        "web",
        nics=(
            NetworkInterface("", "52:00:00:00:00:aa", "10.20.0.9", "fd00::1"),
            NetworkInterface(
                "user", forwards=(PortForward(Protocol.TCP, 22), PortForward(Protocol.UDP, 53, host_port=5300))
            ),
        ),
        autostart=True,
    )


def test_a_protocol_that_there_is_not() -> None:
    request = LaunchRequest(name="web")
    request.nics.add().forwards.add(guest_port=22, protocol=7)  # type: ignore[arg-type]  # protobuf lets it pass
    with pytest.raises(InvalidArgument, match=r"nics\[0\]\.forwards\[0\]\.protocol: must be TCP or UDP, is 7"):
        convert.launch_spec(request)


@pytest.mark.parametrize(("bound", "shown"), [((), [0, 5300]), ((40000, 5300), [40000, 5300])])
def test_the_ports_that_are_bound_are_shown(bound: tuple[int, ...], shown: list[int]) -> None:
    forwards = (PortForward(Protocol.TCP, 22), PortForward(Protocol.UDP, 53, 5300))
    nics = (NetworkInterface("user", "52:00:00:00:00:01", forwards=forwards, bound_ports=bound),)
    instance = model.Instance("web", "uid", "builtin", model.Hardware(1, 128), {}, 0.0, nics=nics, autostart=True)
    message = convert.instance_message(Snapshot(instance, 7))
    assert message.autostart
    [nic] = message.nics
    assert [forward.host_port for forward in nic.forwards] == shown
    assert [instance_pb2.PortForward.Protocol.Name(forward.protocol) for forward in nic.forwards] == ["TCP", "UDP"]


def test_an_address_before_the_agent_is_shown_and_does_not_hide_that_the_agent_is_missing() -> None:
    readiness = Readiness()
    for rung in (Rung.PROCESS, Rung.QMP, Rung.ADDRESS):
        readiness = readiness.climb(rung, now_s=1.0, accepted_at_s=0.0)
    lease = Address("10.20.0.2", 24, "52:00:00:00:00:01", source=Source.LEASE)
    hardware = model.Hardware(1, 128)
    instance = model.Instance("web", "uid", "idle", hardware, {}, 0.0, readiness=readiness, addresses=(lease,))
    message = convert.instance_message(Snapshot(instance, 7))
    assert message.readiness.reached == instance_pb2.Readiness.QMP
    assert [step.rung for step in message.readiness.steps] == [1, 2, 4]
    assert (message.addresses[0].source, message.addresses[0].interface) == (instance_pb2.Address.LEASE, "")


def test_networks_with_and_without_a_subnet() -> None:
    lab = Network("lab", "vmbr0", IPv4Network("10.20.0.0/24"), IPv6Network("fd00:20::/64"), isolated=True)
    assert convert.network_message(lab) == controller_pb2.Network(
        name="lab",
        bridge="vmbr0",
        subnet="10.20.0.0/24",
        gateway="10.20.0.1",
        ipv6_subnet="fd00:20::/64",
        isolated=True,
    )
    assert convert.network_message(Network("office", "br0")) == controller_pb2.Network(name="office", bridge="br0")


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
