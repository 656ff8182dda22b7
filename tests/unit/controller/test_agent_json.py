"""The mapping between messages and the agent's JSON, by itself: what is sent, what is taken, what is refused."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from vmherd.api.v1 import guest_pb2 as pb
from vmherd.controller.agent_json import Mismatch, arguments_of, fill
from vmherd.controller.guest import SERVICE
from vmherd.model.errors import InvalidArgument

RESPONSES = [GetMessageClass(method.output_type) for method in SERVICE.methods]
MEMBERS = sorted({field.name for message in pb.DESCRIPTOR.message_types_by_name.values() for field in message.fields})


@pytest.mark.parametrize(
    "asked",
    [
        pb.GuestPingRequest(name="web"),
        pb.GuestFsfreezeFreezeRequest(name="web", thaw_after={"seconds": 5}),
        pb.GuestFsfreezeFreezeListRequest(name="web", thaw_after={"seconds": 5}),
    ],
)
def test_what_is_vmherd_s_own_is_no_argument(asked: Any) -> None:
    assert arguments_of(asked) == {}


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        (pb.GuestSyncRequest(), {"id": 0}),
        (pb.GuestSyncRequest(id=-(2**63)), {"id": -(2**63)}),
        (pb.GuestFileCloseRequest(), {"handle": 0}),
        (
            pb.GuestFileSeekRequest(handle=1000, whence_name="SET"),
            {"handle": 1000, "offset": 0, "whence": "set"},
        ),
        (pb.GuestFileWriteRequest(handle=1000), {"handle": 1000, "buf-b64": ""}),
        (
            pb.GuestSetUserPasswordRequest(username="root", password=b"\xff"),
            {"username": "root", "password": "/w==", "crypted": False},
        ),
        (
            pb.GuestSetVcpusRequest(vcpus=[{"logical_id": 1}, {"online": True}]),
            {"vcpus": [{"logical-id": 1, "online": False}, {"logical-id": 0, "online": True}]},
        ),
        (
            pb.GuestSetMemoryBlocksRequest(mem_blks=[{"phys_index": 2**64 - 1}]),
            {"mem-blks": [{"phys-index": 2**64 - 1, "online": False}]},
        ),
    ],
)
def test_what_the_agent_needs_is_always_sent(asked: Any, arguments: dict[str, Any]) -> None:
    assert arguments_of(asked) == arguments


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        (pb.GuestSetTimeRequest(), {}),
        (pb.GuestSetTimeRequest(time=0), {"time": 0}),
        (pb.GuestFileReadRequest(handle=1000), {"handle": 1000}),
        (pb.GuestFileReadRequest(handle=1000, count=0), {"handle": 1000, "count": 0}),
        (pb.GuestFstrimRequest(), {}),
        (pb.GuestFstrimRequest(minimum=0), {"minimum": 0}),
        (
            pb.GuestSetVcpusRequest(vcpus=[{"can_offline": False}]),
            {"vcpus": [{"logical-id": 0, "online": False, "can-offline": False}]},
        ),
        (pb.GuestShutdownRequest(), {}),
        (pb.GuestShutdownRequest(mode="REBOOT"), {"mode": "reboot"}),
        (pb.GuestExecRequest(path="id"), {"path": "id"}),
        (
            pb.GuestExecRequest(path="id", arg=["-u", ""], env=["A=b"], input_data=b"", capture_output_flag=False),
            {"path": "id", "arg": ["-u", ""], "env": ["A=b"], "input-data": "", "capture-output": False},
        ),
    ],
)
def test_what_the_agent_can_go_without_is_sent_where_it_is_given(asked: Any, arguments: dict[str, Any]) -> None:
    assert arguments_of(asked) == arguments


def test_an_empty_list_is_sent_only_where_the_agent_needs_one() -> None:
    keys = arguments_of(pb.GuestSshAddAuthorizedKeysRequest(username="root", reset=True))
    assert keys == {"username": "root", "keys": [], "reset": True}
    assert arguments_of(pb.GuestSetVcpusRequest()) == {"vcpus": []}
    assert arguments_of(pb.GuestFsfreezeFreezeListRequest()) == {}


@pytest.mark.parametrize(
    ("fields", "member"),
    [
        ({"capture_output_flag": True}, True),
        ({"capture_output_mode": "MERGED"}, "merged"),
        ({"capture_output_mode": "CAPTURE_OUTPUT_UNSPECIFIED"}, None),
    ],
)
def test_a_member_of_several_kinds_has_one_name(fields: dict[str, Any], member: object) -> None:
    assert arguments_of(pb.GuestExecRequest(path="id", **fields)).get("capture-output") == member


def test_a_number_may_stand_for_the_word_of_where_to_seek() -> None:
    assert arguments_of(pb.GuestFileSeekRequest(whence_value=0))["whence"] == 0


def test_a_word_that_does_not_exist_is_refused() -> None:
    request = pb.GuestShutdownRequest()
    request.mode = 99  # type: ignore[assignment]  # protobuf lets any number pass
    with pytest.raises(InvalidArgument, match="mode: must be one of HALT, POWERDOWN, REBOOT, is 99"):
        arguments_of(request)


@pytest.mark.parametrize(
    "asked", [pb.GuestFileOpenRequest(path="/etc\0/x"), pb.GuestExecRequest(path="sh", arg=["-c", "\0"])]
)
def test_the_agent_would_misread_a_nul_character(asked: Any) -> None:
    with pytest.raises(InvalidArgument, match="must not hold a NUL character"):
        arguments_of(asked)


@pytest.mark.parametrize("asked", [pb.GuestFileOpenRequest(), pb.GuestExecRequest(arg=[""])])
def test_a_text_that_the_agent_needs_is_not_empty(asked: Any) -> None:
    with pytest.raises(InvalidArgument, match="path: must be given"):
        arguments_of(asked)


def test_an_object_fills_the_fields_of_its_members() -> None:
    response = pb.GuestGetOsinfoResponse()
    fill(response, {"id": "debian", "pretty-name": "Debian", "kernel-release": "6.1", "something-newer": [1]})
    assert (response.id, response.pretty_name, response.kernel_release) == ("debian", "Debian", "6.1")
    assert not response.HasField("variant")


def test_snake_case_members_are_understood_too() -> None:
    response = pb.GuestInfoResponse()
    fill(response, {"version": "7.2", "supported_commands": [{"name": "guest-ping", "enabled": True}]})
    assert response.supported_commands[0].enabled


@pytest.mark.parametrize(
    ("response", "result", "field", "value"),
    [
        (pb.GuestSyncResponse(), -(2**63), "id", -(2**63)),
        (pb.GuestGetTimeResponse(), 2**63 - 1, "time", 2**63 - 1),
        (pb.GuestFileOpenResponse(), 1000, "handle", 1000),
        (pb.GuestFsfreezeStatusResponse(), "frozen", "status", pb.GuestFsfreezeStatusResponse.FROZEN),
        (pb.GuestSetVcpusResponse(), 0, "processed", 0),
    ],
)
def test_a_single_value_goes_into_the_only_field(response: Any, result: object, field: str, value: object) -> None:
    fill(response, result)
    assert getattr(response, field) == value


def test_a_list_goes_into_the_only_field() -> None:
    response = pb.GuestGetMemoryBlocksResponse()
    fill(response, [{"phys-index": 2**64 - 1, "online": True, "can-offline": False}, {"phys-index": 0}])
    first, second = response.mem_blks
    assert (first.phys_index, first.online, first.HasField("can_offline"), first.can_offline) == (
        2**64 - 1,
        True,
        True,
        False,
    )
    assert (second.phys_index, second.HasField("can_offline")) == (0, False)


def test_bytes_are_base64() -> None:
    response = pb.GuestExecStatusResponse()
    fill(response, {"exited": True, "exitcode": 0, "out-data": base64.b64encode(bytes(range(256))).decode()})
    assert response.out_data == bytes(range(256))
    assert not response.HasField("err_data")


@pytest.mark.parametrize(
    ("word", "value"),
    [("file-backed-virtual", "FILE_BACKED_VIRTUAL"), ("ieee1394", "IEEE1394"), ("thunderbolt", "BUS_TYPE_UNSPECIFIED")],
)
def test_a_word_that_nobody_knew_yet_is_unspecified(word: str, value: str) -> None:
    response = pb.GuestDiskAddress()
    fill(response, {"bus-type": word, "bus": 7})
    assert (pb.GuestDiskAddress.BusType.Name(response.bus_type), response.bus) == (value, 7)


@pytest.mark.parametrize(
    ("response", "result"),
    [
        (pb.GuestGetOsinfoResponse(), {"id": 1}),
        (pb.GuestGetOsinfoResponse(), {"id": ["debian"]}),
        (pb.GuestGetOsinfoResponse(), "debian"),
        (pb.GuestPingResponse(), "pong"),
        (pb.GuestInfoResponse(), {"supported_commands": "all"}),
        (pb.GuestInfoResponse(), {"supported_commands": [["guest-ping"]]}),
        (pb.GuestInfoResponse(), {"supported_commands": [{"enabled": 1}]}),
        (pb.GuestNetworkInterface(), {"statistics": {"rx-bytes": -1}}),
        (pb.GuestNetworkInterface(), {"statistics": {"rx-bytes": 2**64}}),
        (pb.GuestNetworkInterface(), {"statistics": {"rx-bytes": True}}),
        (pb.GuestNetworkInterface(), {"statistics": []}),
        (pb.GuestNetworkInterface(), {"ip-addresses": [{"prefix": 1.5}]}),
        (pb.GuestSyncResponse(), 2**63),
        (pb.GuestSyncResponse(), "1"),
        (pb.GuestGetTimeResponse(), 1.0),
        (pb.GuestFsfreezeStatusResponse(), 1),
        (pb.GuestGetVcpusResponse(), 3),
        (pb.GuestGetVcpusResponse(), [None]),
        (pb.GuestFileReadResponse(), {"buf-b64": "no base64"}),
        (pb.GuestFileReadResponse(), {"buf-b64": "é==="}),
        (pb.GuestFileReadResponse(), {"buf-b64": 1}),
        (pb.GuestGetLoadResponse(), {"load1m": "0.5"}),
    ],
)
def test_nonsense_is_named(response: Any, result: object) -> None:
    with pytest.raises(Mismatch):
        fill(response, result)


def test_half_a_character_is_replaced() -> None:
    response = pb.GuestGetHostNameResponse()
    fill(response, {"host-name": "a\ud800b"})
    assert response.host_name == "a?b"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(RESPONSES), JSON)
def test_whatever_an_agent_says_is_taken_or_named_as_nonsense(kind: Any, result: object) -> None:
    with contextlib.suppress(Mismatch):
        fill(kind(), result)
