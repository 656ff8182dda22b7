"""GuestService against QEMU's reference, and what its servicer makes of a request before the agent hears of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from google.api.annotations_pb2 import http
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from vmherd.api.v1 import guest_pb2 as pb
from vmherd.controller import commands
from vmherd.controller.guest import COMMANDS, SERVICE, GuestServicer, command_of
from vmherd.model.errors import InvalidArgument

pytestmark = pytest.mark.anyio

METHODS: dict[str, MethodDescriptor] = dict(SERVICE.methods_by_name)

REFERENCE = {
    "guest-sync": "id:int -> int",
    "guest-sync-delimited": "id:int -> int",
    "guest-ping": "->",
    "guest-get-time": "-> int",
    "guest-set-time": "time?:int ->",
    "guest-info": "-> version:str supported_commands:[GuestAgentCommandInfo]",
    "guest-shutdown": "mode?:enum ->",
    "guest-file-open": "path:str mode?:str -> int",
    "guest-file-close": "handle:int ->",
    "guest-file-read": "handle:int count?:int -> count:int buf-b64:bytes eof:bool",
    "guest-file-write": "handle:int buf-b64:bytes count?:int -> count:int eof:bool",
    "guest-file-seek": "handle:int offset:int whence:enum|int -> position:int eof:bool",
    "guest-file-flush": "handle:int ->",
    "guest-fsfreeze-status": "-> enum",
    "guest-fsfreeze-freeze": "-> int",
    "guest-fsfreeze-freeze-list": "mountpoints:[str] -> int",
    "guest-fsfreeze-thaw": "-> int",
    "guest-fstrim": "minimum?:int -> paths:[GuestFilesystemTrimResult]",
    "guest-suspend-disk": "->",
    "guest-suspend-ram": "->",
    "guest-suspend-hybrid": "->",
    "guest-network-get-interfaces": "-> [GuestNetworkInterface]",
    "guest-get-vcpus": "-> [GuestLogicalProcessor]",
    "guest-set-vcpus": "vcpus:[GuestLogicalProcessor] -> int",
    "guest-get-disks": "-> [GuestDiskInfo]",
    "guest-get-fsinfo": "-> [GuestFilesystemInfo]",
    "guest-set-user-password": "username:str password:bytes crypted:bool ->",
    "guest-get-memory-blocks": "-> [GuestMemoryBlock]",
    "guest-set-memory-blocks": "mem-blks:[GuestMemoryBlock] -> [GuestMemoryBlockResponse]",
    "guest-get-memory-block-info": "-> size:uint",
    "guest-exec": "path:str arg:[str] env:[str] input-data?:bytes capture-output:bool|enum -> pid:int",
    "guest-exec-status": (
        "pid:int -> exited:bool exitcode?:int signal?:int out-data?:bytes err-data?:bytes"
        " out-truncated?:bool err-truncated?:bool"
    ),
    "guest-get-host-name": "-> host-name:str",
    "guest-get-users": "-> [GuestUser]",
    "guest-get-timezone": "-> zone?:str offset:int",
    "guest-get-osinfo": (
        "-> kernel-release?:str kernel-version?:str machine?:str id?:str name?:str pretty-name?:str version?:str"
        " version-id?:str variant?:str variant-id?:str"
    ),
    "guest-get-devices": "-> [GuestDeviceInfo]",
    "guest-ssh-get-authorized-keys": "username:str -> keys:[str]",
    "guest-ssh-add-authorized-keys": "username:str keys:[str] reset?:bool ->",
    "guest-ssh-remove-authorized-keys": "username:str keys:[str] ->",
    "guest-get-diskstats": "-> [GuestDiskStatsInfo]",
    "guest-get-cpustats": "-> [GuestCpuStats]",
    "guest-get-load": "-> load1m:number load5m:number load15m:number",
    "guest-network-get-route": "-> [GuestNetworkRoute]",
}
"""Every command of QEMU's qga/qapi-schema.json up to 11.0; a `?` marks what may be absent."""

TYPES = {
    "GuestAgentCommandInfo": "name:str enabled:bool success-response:bool",
    "GuestFilesystemTrimResult": "path:str trimmed?:int minimum?:int error?:str",
    "GuestNetworkInterface": (
        "name:str hardware-address?:str ip-addresses:[GuestIpAddress] statistics?:GuestNetworkInterfaceStat"
    ),
    "GuestIpAddress": "ip-address:str ip-address-type:enum prefix:int",
    "GuestNetworkInterfaceStat": (
        "rx-bytes:uint rx-packets:uint rx-errs:uint rx-dropped:uint"
        " tx-bytes:uint tx-packets:uint tx-errs:uint tx-dropped:uint"
    ),
    "GuestLogicalProcessor": "logical-id:int online:bool can-offline?:bool",
    "GuestDiskInfo": (
        "name:str partition:bool dependencies:[str] address?:GuestDiskAddress alias?:str smart?:GuestDiskSmart"
    ),
    "GuestDiskAddress": (
        "pci-controller:GuestPciAddress bus-type:enum bus:int target:int unit:int serial?:str dev?:str"
        " ccw-address?:GuestCcwAddress"
    ),
    "GuestPciAddress": "domain:int bus:int slot:int function:int",
    "GuestCcwAddress": "cssid:int ssid:int subchno:int devno:int",
    "GuestDiskSmart": (
        "type:enum critical-warning?:int temperature?:int available-spare?:int available-spare-threshold?:int"
        " percentage-used?:int"
        " data-units-read-lo?:uint data-units-read-hi?:uint data-units-written-lo?:uint data-units-written-hi?:uint"
        " host-read-commands-lo?:uint host-read-commands-hi?:uint"
        " host-write-commands-lo?:uint host-write-commands-hi?:uint"
        " controller-busy-time-lo?:uint controller-busy-time-hi?:uint power-cycles-lo?:uint power-cycles-hi?:uint"
        " power-on-hours-lo?:uint power-on-hours-hi?:uint unsafe-shutdowns-lo?:uint unsafe-shutdowns-hi?:uint"
        " media-errors-lo?:uint media-errors-hi?:uint"
        " number-of-error-log-entries-lo?:uint number-of-error-log-entries-hi?:uint"
    ),
    "GuestFilesystemInfo": (
        "name:str mountpoint:str type:str used-bytes?:uint total-bytes?:uint total-bytes-privileged?:uint"
        " disk:[GuestDiskAddress]"
    ),
    "GuestMemoryBlock": "phys-index:uint online:bool can-offline?:bool",
    "GuestMemoryBlockResponse": "phys-index:uint response:enum error-code?:int",
    "GuestUser": "user:str login-time:number domain?:str",
    "GuestDeviceInfo": "driver-name:str driver-date?:int driver-version?:str id?:GuestDeviceId",
    "GuestDeviceId": "type:enum vendor-id?:uint device-id?:uint",
    "GuestDiskStatsInfo": "name:str major:uint minor:uint stats:GuestDiskStats",
    "GuestDiskStats": (
        "read-sectors?:uint read-ios?:uint read-merges?:uint write-sectors?:uint write-ios?:uint write-merges?:uint"
        " discard-sectors?:uint discard-ios?:uint discard-merges?:uint flush-ios?:uint read-ticks?:uint"
        " write-ticks?:uint discard-ticks?:uint flush-ticks?:uint ios-pgr?:uint total-ticks?:uint weight-ticks?:uint"
    ),
    "GuestCpuStats": (
        "type:enum cpu:int user:uint nice:uint system:uint idle:uint iowait?:uint irq?:uint softirq?:uint steal?:uint"
        " guest?:uint guestnice?:uint"
    ),
    "GuestNetworkRoute": (
        "iface:str destination:str metric:int gateway?:str mask?:str irtt?:int flags?:uint refcnt?:int use?:int"
        " window?:int mtu?:int desprefixlen?:str source?:str srcprefixlen?:str nexthop?:str version:int"
    ),
}
"""The types of QEMU's qga/qapi-schema.json that the commands name; a union's variants stand beside its own members."""

ENUMS = {
    pb.GuestShutdownRequest.Mode: "halt powerdown reboot",
    pb.GuestFileSeekRequest.Whence: "set cur end",
    pb.GuestFsfreezeStatusResponse.Status: "thawed frozen",
    pb.GuestIpAddress.Type: "ipv4 ipv6",
    pb.GuestDiskAddress.BusType: (
        "ide fdc scsi virtio xen usb uml sata sd unknown ieee1394 ssa fibre raid iscsi sas mmc virtual"
        " file-backed-virtual nvme"
    ),
    pb.GuestMemoryBlockResponse.Type: "success not-found operation-not-supported operation-failed",
    pb.GuestExecRequest.CaptureOutput: "none stdout stderr separated merged",
    pb.GuestDeviceId.Type: "pci",
    pb.GuestCpuStats.Type: "linux",
}

READING = {
    "guest-sync",
    "guest-sync-delimited",
    "guest-ping",
    "guest-info",
    "guest-get-time",
    "guest-fsfreeze-status",
    "guest-network-get-interfaces",
    "guest-get-vcpus",
    "guest-get-disks",
    "guest-get-fsinfo",
    "guest-get-memory-blocks",
    "guest-get-memory-block-info",
    "guest-get-host-name",
    "guest-get-users",
    "guest-get-timezone",
    "guest-get-osinfo",
    "guest-get-devices",
    "guest-ssh-get-authorized-keys",
    "guest-get-diskstats",
    "guest-get-cpustats",
    "guest-get-load",
    "guest-network-get-route",
}
"""The commands that change nothing in the guest or its agent."""

_KINDS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT64: "int",
    FieldDescriptor.TYPE_UINT64: "uint",
    FieldDescriptor.TYPE_UINT32: "uint",
    FieldDescriptor.TYPE_DOUBLE: "number",
    FieldDescriptor.TYPE_STRING: "str",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_ENUM: "enum",
}


def _shape(message: Descriptor, *, without: tuple[str, ...] = ()) -> str:
    """A message as the tables above write it."""
    words: dict[str, str] = {}
    for field in message.fields:
        if field.name in without:
            continue
        kind = field.message_type.name if field.message_type else _KINDS[field.type]
        oneof = field.containing_oneof
        if oneof and len(oneof.fields) > 1:
            words[oneof.name] = "|".join(sorted(_KINDS[it.type] for it in oneof.fields))
        elif field.is_repeated:
            words[field.name] = f"[{kind}]"
        else:
            optional = oneof or (kind == "enum" and message.name.endswith("Request"))
            words[field.name + "?" * bool(optional)] = kind
    return " ".join(f"{name.replace('_', '-')}:{kind}" for name, kind in words.items())


def test_every_command_of_the_reference_is_an_rpc() -> None:
    assert set(COMMANDS.values()) == set(REFERENCE)
    assert set(METHODS) - set(COMMANDS) == {"Execute"}


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_and_results_are_those_of_the_reference(name: str) -> None:
    arguments, _, result = REFERENCE[COMMANDS[name]].replace("supported_commands", "supported-commands").partition("->")
    method = METHODS[name]
    assert _shape(method.input_type, without=("name", "thaw_after")) == arguments.strip()
    shape = _shape(method.output_type)
    assert (shape if ":" in result or not result else shape.partition(":")[2]) == result.strip()


@pytest.mark.parametrize("name", TYPES)
def test_types_are_those_of_the_reference(name: str) -> None:
    message: Any = pb.DESCRIPTOR.message_types_by_name[name]
    assert _shape(message) == TYPES[name]


def test_words_are_those_of_the_reference() -> None:
    for enum, words in ENUMS.items():
        unspecified, *names = enum.keys()
        assert unspecified.endswith("_UNSPECIFIED")
        assert [name.lower().replace("_", "-") for name in names] == words.split()
    enums = {enum for message in pb.DESCRIPTOR.message_types_by_name.values() for enum in message.enum_types}
    assert {enum.full_name for enum in enums} == {enum.DESCRIPTOR.full_name for enum in ENUMS}


def test_messages_are_named_after_their_commands() -> None:
    for method in METHODS.values():
        words = "".join(word.capitalize() for word in command_of(method).split("-"))
        assert (method.input_type.name, method.output_type.name) == (f"{words}Request", f"{words}Response")


@pytest.mark.parametrize("name", METHODS)
def test_a_route_is_named_after_its_command_and_only_reading_is_a_get(name: str) -> None:
    rule = METHODS[name].GetOptions().Extensions[http]
    command = command_of(METHODS[name])
    verb = "get" if command in READING else "post"
    assert rule.WhichOneof("pattern") == verb
    assert getattr(rule, verb) == f"/v1/instances/{{name}}/guest/{command.removeprefix('guest-')}"
    assert rule.body == ("" if verb == "get" else "*")


class Calls:
    """Stands in for `commands.execute`: notes what it is asked, and gives `result`."""

    def __init__(self) -> None:
        self.result: object = {}
        self.seen: list[tuple[str, Mapping[str, object], float | None]] = []

    async def __call__(
        self,
        supervisor: object,
        command: str,
        arguments: Mapping[str, object],
        *,
        timeout_s: float,
        thaw_after_s: float | None = None,
    ) -> object:
        self.seen.append((command, arguments, thaw_after_s))
        return self.result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(commands, "execute", calls)
    return calls


class _Herd:
    def find(self, name: str) -> object:
        return object()


class _Context:
    def time_remaining(self) -> float | None:
        return None


async def ask(rpc: str, **fields: Any) -> Any:
    """Calls a handler as gRPC does."""
    request = getattr(pb, METHODS[rpc].input_type.name)(name="web", **fields)
    servicer: Any = GuestServicer(_Herd(), agent_timeout_s=10)  # type: ignore[arg-type]
    return await getattr(servicer, rpc)(request, _Context())


async def test_a_handler_hands_over_arguments_and_result(calls: Calls) -> None:
    calls.result = {"position": 0, "eof": False}
    assert await ask("FileSeek", handle=1000, whence_name="SET") == pb.GuestFileSeekResponse()
    [(command, arguments, _)] = calls.seen
    assert (command, arguments) == ("guest-file-seek", {"handle": 1000, "offset": 0, "whence": "set"})


@pytest.mark.parametrize(
    ("rpc", "fields", "message"),
    [
        ("FileRead", {"handle": 1000, "count": (32 << 20) + 1}, "count: must be at most 33554432"),
        ("FileSeek", {"handle": 1000}, "whence_name: must be one of SET, CUR, END"),
        ("FileSeek", {"whence_name": "WHENCE_UNSPECIFIED"}, "whence_name: must be one of SET, CUR, END"),
        ("SetUserPassword", {"username": "root", "password": b"a\0b"}, "password: must not hold a NUL"),
        ("FileOpen", {"path": "/a\0b"}, "path: must not hold a NUL"),
        ("FsfreezeFreeze", {"thaw_after": {"seconds": 3601}}, "thaw_after: must be from 1 s to 3600 s, is 3601 s"),
        ("FsfreezeFreeze", {"thaw_after": {}}, "thaw_after: must be from 1 s to 3600 s, is 0 s"),
        ("FsfreezeFreezeList", {"thaw_after": {"seconds": -1}}, "thaw_after: must be from 1 s"),
        ("Execute", {"command": ""}, "command: must be the name of an agent's command"),
        ("Execute", {"command": "guest-ping\n"}, "command: must be the name of an agent's command"),
        ("Execute", {"command": "g" * 101}, "command: must be the name of an agent's command"),
        ("Execute", {"command": "guest-ping", "arguments_json": "[]"}, "arguments_json: must be a JSON object such"),
        ("Execute", {"command": "guest-ping", "arguments_json": "{"}, "arguments_json: not JSON"),
        ("Execute", {"command": "guest-ping", "arguments_json": '{"a": NaN}'}, "NaN is not JSON"),
        ("Execute", {"command": "guest-ping", "arguments_json": '{"a": 1e999}'}, "a number out of range"),
        ("Execute", {"command": "guest-ping", "arguments_json": f'{{"a": {2**64}}}'}, "more than 64 bits"),
        ("Execute", {"command": "guest-ping", "arguments_json": '{"a": "\\ud800"}'}, "arguments_json: not JSON"),
        ("Execute", {"command": "guest-ping", "arguments_json": '{"a":' * 5000}, "arguments_json: nested too deep"),
        (
            "Execute",
            {"command": "guest-ping", "arguments_json": " " * (1 << 20) + "{}"},
            "longer than 1048576 characters",
        ),
    ],
)
async def test_a_wrong_request_never_reaches_the_agent(
    calls: Calls, rpc: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await ask(rpc, **fields)
    assert message in caught.value.message
    assert caught.value.violations
    assert calls.seen == []


@pytest.mark.parametrize(
    ("rpc", "fields", "thaw_after_s"),
    [
        ("FsfreezeFreeze", {}, 60),
        ("FsfreezeFreeze", {"thaw_after": {"seconds": 1}}, 1),
        ("FsfreezeFreezeList", {"thaw_after": {"seconds": 3600}, "mountpoints": ["/"]}, 3600),
        ("Execute", {"command": "guest-fsfreeze-freeze"}, 60),
    ],
)
async def test_every_freeze_has_an_end(calls: Calls, rpc: str, fields: dict[str, Any], thaw_after_s: float) -> None:
    calls.result = 1
    await ask(rpc, **fields)
    [(_, arguments, seen_s)] = calls.seen
    assert seen_s == thaw_after_s
    assert "thaw-after" not in arguments


async def test_any_command_can_be_called_in_json(calls: Calls) -> None:
    calls.result = {"time": 2**63 - 1, "half": 0.1, "ä": None}
    answer = await ask("Execute", command="guest-future", arguments_json='{"max": 18446744073709551615}')
    assert calls.seen[0][:2] == ("guest-future", {"max": 2**64 - 1})
    assert answer.result_json == '{"time": 9223372036854775807, "half": 0.1, "ä": null}'
    calls.result = [1]
    assert json.loads((await ask("Execute", command="guest-future")).result_json) == [1]
    assert calls.seen[1][1] == {}
