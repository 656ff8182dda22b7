from __future__ import annotations

import pytest

from vmherd.controller.records import Outcome, Request, decode_instance, decode_request, encode_instance, encode_request
from vmherd.model.instance import (
    Address,
    Cause,
    Exit,
    Hardware,
    Instance,
    NetworkInterface,
    Operation,
    Source,
    StopStep,
    Verb,
    started,
)
from vmherd.model.lifecycle import State
from vmherd.model.machine import PortForward, Protocol, mac_of
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
    addresses=(Address("10.0.2.15", 24, "52:00:00:00:00:01", "eth0", Source.LEASE),),
    last_exit=Exit(Cause.STOPPED, "detail", 9.0, StopStep.QUIT, 0, None, "tail"),
    operation=Operation("id", Verb.STOP, ("r1", "r2"), True, 2.5),
    nics=(
        NetworkInterface("lab", "52:00:00:00:00:01", "10.20.0.2", "fd00::1"),
        NetworkInterface("user", "52:00:00:00:00:02", forwards=(PortForward(Protocol.UDP, 53),), bound_ports=(40000,)),
    ),
    autostart=True,
)

EARLIER = (
    b'{"name":"web","uid":"6b6a2c52-93f5-4a6c-8d3e-7f1f1c7f6f01","image":"builtin","hardware":{"cpus":1,"memory_mib":'
    b'128},"labels":{},"created_at_s":1.5,"state":"RUNNING","generation":2,"accepted_at_s":2.5,"readiness":{"steps":['
    b'{"rung":1,"reached_at_s":3.0,"elapsed_s":0.5}]},"addresses":[{"address":"10.0.2.15","prefix_length":24,"mac":'
    b'"52:36:d3:30:10:c4","interface":"eth0"}],"frozen_until_s":null,"last_exit":null,"operation":null}'
)
"""As the version wrote it that knew neither networks nor autostart."""


@pytest.mark.parametrize("instance", [FULL, Instance("a", "u", "builtin", Hardware(1, 32), {}, 0.0)])
def test_an_instance_survives_the_store(instance: Instance) -> None:
    assert decode_instance(encode_instance(instance)) == instance


@pytest.mark.parametrize("outcome", [None, Outcome(FULL), Outcome(error='{"code": 9}')])
def test_a_request_survives_the_store(outcome: Outcome | None) -> None:
    request = Request(Verb.STOP, "print", "web", "id", 1.5, outcome)
    assert decode_request(encode_request(request)) == request


def test_a_record_of_an_earlier_version_has_the_one_network_interface_that_there_was() -> None:
    instance = decode_instance(EARLIER)
    assert instance.nics == (NetworkInterface("user", mac_of(instance.uid)),)
    assert not instance.autostart
    assert instance.addresses[0].source is Source.AGENT
    assert decode_instance(encode_instance(instance)) == instance
    outcome = b'{"verb":"stop","fingerprint":"p","name":"web","operation_id":"id","accepted_at_s":1.5,"outcome":'
    request = decode_request(outcome + b'{"instance":' + EARLIER + b',"error":"","revision":0}}')
    assert request.outcome == Outcome(instance)


def test_an_instance_without_a_network_interface_keeps_it_so() -> None:
    instance = Instance("a", "u", "builtin", Hardware(1, 32), {}, 0.0, nics=())
    assert decode_instance(encode_instance(instance)).nics == ()


@pytest.mark.parametrize("value", [b"", b"{}", b'{"name": 1}', b"\xff"])
def test_what_is_no_record_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"validation error|Invalid JSON"):
        decode_instance(value)


def test_a_start_begins_anew_and_keeps_the_last_exit() -> None:
    instance = started(decode_instance(encode_instance(FULL)), 20.0)
    assert (instance.generation, instance.accepted_at_s) == (4, 20.0)
    assert (instance.readiness, instance.addresses) == (Readiness(), ())
    assert [nic.bound_ports for nic in instance.nics] == [(), ()]
    assert [nic.ipv4_address for nic in instance.nics] == ["10.20.0.2", ""]
    assert instance.last_exit == FULL.last_exit
