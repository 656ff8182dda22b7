from __future__ import annotations

from typing import Any

import pytest

from vmherd.api.v1 import guest_pb2
from vmherd.controller.agent_json import Mismatch, arguments_of, fill
from vmherd.controller.guest import SERVICE, GuestServicer, command_of


def test_rpcs_are_named_after_their_commands() -> None:
    assert {command_of(method) for method in SERVICE.methods} == {
        "guest-ping",
        "guest-info",
        "guest-get-osinfo",
        "guest-network-get-interfaces",
        "guest-get-host-name",
    }


def test_messages_are_named_after_their_commands() -> None:
    for method in SERVICE.methods:
        words = "".join(word.capitalize() for word in command_of(method).split("-"))
        assert (method.input_type.name, method.output_type.name) == (f"{words}Request", f"{words}Response")


def test_every_rpc_has_a_handler() -> None:
    assert all(callable(getattr(GuestServicer, method.name)) for method in SERVICE.methods)


def test_the_instance_s_name_is_no_argument_of_the_command() -> None:
    assert arguments_of(guest_pb2.GuestPingRequest(name="web")) == {}


def test_an_object_fills_the_fields_of_its_members() -> None:
    response = guest_pb2.GuestGetOsinfoResponse()
    fill(response, {"id": "debian", "pretty-name": "Debian", "kernel-release": "6.1", "something-newer": [1]})
    assert (response.id, response.pretty_name, response.kernel_release) == ("debian", "Debian", "6.1")
    assert not response.HasField("variant")


def test_a_list_goes_into_the_only_field() -> None:
    response = guest_pb2.GuestNetworkGetInterfacesResponse()
    statistics = {"rx-bytes": 2**64 - 1, "rx-packets": 2, "tx-bytes": 0}
    fill(
        response,
        [
            {"name": "lo", "ip-addresses": [{"ip-address": "::1", "ip-address-type": "ipv6", "prefix": 128}]},
            {"name": "eth0", "hardware-address": "52:54:00:00:00:01", "statistics": statistics},
        ],
    )
    assert [interface.name for interface in response.interfaces] == ["lo", "eth0"]
    assert response.interfaces[0].ip_addresses[0].prefix == 128
    assert not response.interfaces[0].HasField("statistics")
    assert response.interfaces[1].statistics.rx_bytes == 2**64 - 1


def test_snake_case_members_are_understood_too() -> None:
    response = guest_pb2.GuestInfoResponse()
    fill(response, {"version": "7.2", "supported_commands": [{"name": "guest-ping", "enabled": True}]})
    assert response.supported_commands[0].enabled


@pytest.mark.parametrize(
    ("response", "result"),
    [
        (guest_pb2.GuestGetOsinfoResponse(), {"id": 1}),
        (guest_pb2.GuestGetOsinfoResponse(), {"id": ["debian"]}),
        (guest_pb2.GuestGetOsinfoResponse(), "debian"),
        (guest_pb2.GuestInfoResponse(), {"supported_commands": "all"}),
        (guest_pb2.GuestInfoResponse(), {"supported_commands": [["guest-ping"]]}),
        (guest_pb2.GuestInfoResponse(), {"supported_commands": [{"enabled": 1}]}),
        (guest_pb2.GuestNetworkInterface(), {"statistics": {"rx-bytes": -1}}),
        (guest_pb2.GuestNetworkInterface(), {"statistics": {"rx-bytes": 2**64}}),
        (guest_pb2.GuestNetworkInterface(), {"statistics": {"rx-bytes": True}}),
        (guest_pb2.GuestNetworkInterface(), {"ip-addresses": [{"prefix": 1.5}]}),
    ],
)
def test_nonsense_is_named(response: Any, result: object) -> None:
    with pytest.raises(Mismatch):
        fill(response, result)


def test_half_a_character_is_replaced() -> None:
    response = guest_pb2.GuestGetHostNameResponse()
    fill(response, {"host-name": "a\ud800b"})
    assert response.host_name == "a?b"
