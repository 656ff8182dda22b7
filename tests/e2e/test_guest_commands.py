"""The agent's commands over HTTP and gRPC, in the real built-in guest: what they answer is what its shell says."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.framework.herd import HerdUnderTest, reason
from vmherd.api.v1 import guest_pb2 as pb
from vmherd.client import Client
from vmherd.model.errors import InvalidArgument

INT64_MAX = 2**63 - 1
S_NS = 1_000_000_000


@pytest.fixture(scope="module")
def herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    """A herd with one instance that has two processors."""
    shared_herd.launch("web", hardware={"cpus": 2, "memoryMib": 256}, until="ADDRESS")
    shared_herd.eventually(lambda: shared_herd.run("test", "-e", "/dev/vda")["exitCode"] == 0)
    return shared_herd


@pytest.fixture(scope="module")
def client(herd: HerdUnderTest) -> Iterator[Client]:
    with herd.client() as client:
        yield client


def get(herd: HerdUnderTest, command: str, /, **query: Any) -> Any:
    response = herd.http.get(f"/v1/instances/web/guest/{command}", params=query)
    assert response.status_code == 200, response.text
    return response.json()


def post(herd: HerdUnderTest, command: str, /, **fields: Any) -> Any:
    response = herd.http.post(f"/v1/instances/web/guest/{command}", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def lines(herd: HerdUnderTest, script: str) -> list[list[str]]:
    return [line.split() for line in herd.shell(script).splitlines()]


@pytest.mark.parametrize("command", ["sync", "sync-delimited"])
@pytest.mark.parametrize("number", [0, INT64_MAX, -(2**63)])
def test_sync(herd: HerdUnderTest, command: str, number: int) -> None:
    assert get(herd, command, id=number) == {"id": str(number)}


def test_ping(herd: HerdUnderTest) -> None:
    assert get(herd, "ping") == {}


def test_info(herd: HerdUnderTest) -> None:
    info = get(herd, "info")
    assert f"QEMU Guest Agent {info['version']}" in herd.shell("qemu-ga --version")
    commands = {it["name"]: it for it in info["supportedCommands"]}
    assert sorted(commands) == sorted(herd.shell("qemu-ga -b help").split())
    assert commands["guest-ping"] == {"name": "guest-ping", "enabled": True, "successResponse": True}
    assert not commands["guest-shutdown"]["successResponse"]


def test_time_is_set_and_read_to_the_nanosecond_s_digits(herd: HerdUnderTest, client: Client) -> None:
    past_ns = 1_700_000_000 * S_NS
    try:
        assert post(herd, "set-time", time=str(past_ns)) == {}
        assert 0 <= int(get(herd, "get-time")["time"]) - past_ns < 60 * S_NS
        assert 0 <= int(herd.shell("date +%s")) - 1_700_000_000 < 60
        # Without a time the guest takes that of its hardware clock, which went along.
        client.guest.SetTime(pb.GuestSetTimeRequest(name="web"))
        assert 0 <= client.guest.GetTime(pb.GuestGetTimeRequest(name="web")).time - past_ns < 60 * S_NS
    finally:
        post(herd, "set-time", time=str(time.time_ns()))
    assert abs(int(get(herd, "get-time")["time"]) - time.time_ns()) < 60 * S_NS


def test_a_file_is_written_read_and_sought(herd: HerdUnderTest) -> None:
    content = bytes(range(256)) * 20
    encoded = base64.b64encode(content).decode()
    handle = post(herd, "file-open", path="/tmp/a file", mode="w+")["handle"]
    assert post(herd, "file-write", handle=handle, bufB64=encoded) == {"count": str(len(content)), "eof": False}
    assert post(herd, "file-flush", handle=handle) == {}
    assert herd.shell("wc -c < '/tmp/a file'").strip() == str(len(content))
    assert post(herd, "file-seek", handle=handle, offset=0, whenceName="SET") == {"position": "0", "eof": False}
    assert post(herd, "file-seek", handle=handle, offset="-5", whenceName="END") == {
        "position": str(len(content) - 5),
        "eof": False,
    }
    assert post(herd, "file-read", handle=handle, count=3) == {
        "count": "3",
        "bufB64": base64.b64encode(content[-5:-2]).decode(),
        "eof": False,
    }
    assert post(herd, "file-seek", handle=handle, whenceValue=0)["position"] == "0"
    assert post(herd, "file-read", handle=handle, count=1 << 20) == {
        "count": str(len(content)),
        "bufB64": encoded,
        "eof": True,
    }
    assert post(herd, "file-close", handle=handle) == {}
    gone = herd.http.post("/v1/instances/web/guest/file-close", json={"handle": handle})
    assert (gone.status_code, reason(gone)) == (409, "AGENT_COMMAND_FAILED")
    assert f"handle '{handle}' has not been found" in gone.text


def test_a_program_is_started_and_reaped(herd: HerdUnderTest) -> None:
    pid = post(
        herd,
        "exec",
        path="sh",
        arg=["-c", "cat; echo $A >&2; exit 7"],
        env=["A=b c", "PATH=/bin:/usr/bin"],
        inputData=base64.b64encode(b"in\n").decode(),
        captureOutputFlag=True,
    )["pid"]
    statuses: list[dict[str, Any]] = []

    def ended() -> bool:
        statuses.append(post(herd, "exec-status", pid=pid))
        return bool(statuses[-1]["exited"])

    herd.eventually(ended, timeout_s=20)
    assert statuses[-1] == {
        "exited": True,
        "exitcode": "7",
        "outData": base64.b64encode(b"in\n").decode(),
        "errData": base64.b64encode(b"b c\n").decode(),
        "outTruncated": False,
        "errTruncated": False,
    }
    again = herd.http.post("/v1/instances/web/guest/exec-status", json={"pid": pid})
    assert (again.status_code, reason(again)) == (409, "AGENT_COMMAND_FAILED")


def test_network_interfaces(herd: HerdUnderTest) -> None:
    interfaces = {it["name"]: it for it in get(herd, "network-get-interfaces")["interfaces"]}
    assert sorted(interfaces) == sorted(herd.shell("ls /sys/class/net").split())
    eth0 = interfaces["eth0"]
    assert eth0["hardwareAddress"] == herd.shell("cat /sys/class/net/eth0/address").strip()
    [address] = [it for it in eth0["ipAddresses"] if it["ipAddressType"] == "IPV4"]
    assert f"inet {address['ipAddress']}/{address['prefix']} " in herd.shell("ip address show eth0")


def test_a_processor_goes_and_comes_back(herd: HerdUnderTest, client: Client) -> None:
    def online() -> set[str]:
        return {it["logicalId"] for it in get(herd, "get-vcpus")["vcpus"] if it["online"]}

    assert online() == {"0", "1"}
    try:
        assert post(herd, "set-vcpus", vcpus=[{"logicalId": 1, "online": False}]) == {"processed": "1"}
        assert online() == {"0"}
        assert herd.shell("cat /sys/devices/system/cpu/online").strip() == "0"
    finally:
        asked = pb.GuestSetVcpusRequest(name="web", vcpus=[{"logical_id": 1, "online": True}, {"logical_id": 99}])
        assert client.guest.SetVcpus(asked).processed == 1  # there is no 99
    assert online() == {"0", "1"}
    assert post(herd, "set-vcpus", vcpus=[]) == {"processed": "0"}


def test_memory_blocks(herd: HerdUnderTest) -> None:
    def online() -> dict[int, bool]:
        return {int(it["physIndex"]): it["online"] for it in get(herd, "get-memory-blocks")["memBlks"]}

    def real() -> dict[int, bool]:
        states = lines(
            herd, "cd /sys/devices/system/memory; for it in memory*; do echo ${it#memory} $(cat $it/state); done"
        )
        return {int(index): state == "online" for index, state in states}

    assert int(get(herd, "get-memory-block-info")["size"]) == int(
        herd.shell("cat /sys/devices/system/memory/block_size_bytes"), 16
    )
    assert online() == real()
    last = max(online())
    kept, changed, missing = post(
        herd,
        "set-memory-blocks",
        memBlks=[
            {"physIndex": 0, "online": True},
            {"physIndex": last, "online": False},
            {"physIndex": 77, "online": False},
        ],
    )["responses"]
    assert kept == {"physIndex": "0", "response": "SUCCESS"}
    assert (missing["physIndex"], missing["response"]) == ("77", "NOT_FOUND")
    # Whether a small guest can spare a block is for its kernel to say; the answer is what came of it.
    assert online() == real()
    assert (changed["response"] == "SUCCESS") is not online()[last]
    assert ("errorCode" in changed) is online()[last]
    [back] = post(herd, "set-memory-blocks", memBlks=[{"physIndex": last, "online": True}])["responses"]
    assert back == {"physIndex": str(last), "response": "SUCCESS"}


def test_disks_and_file_systems(herd: HerdUnderTest) -> None:
    [disk] = get(herd, "get-disks")["disks"]
    assert [disk["name"].removeprefix("/dev/")] == herd.shell("ls /sys/block").split()
    assert disk["partition"] is False
    pci = disk["address"]["pciController"]
    slot = f"{int(pci['domain']):04x}:{int(pci['bus']):02x}:{int(pci['slot']):02x}.{int(pci['function'])}"
    assert f"/{slot}/virtio" in herd.shell("readlink -f /sys/block/vda")
    assert disk["address"]["busType"] == "VIRTIO"
    # The guest lives in memory: what is mounted there is no file system of a disk.
    assert get(herd, "get-fsinfo") == {"filesystems": []}
    assert post(herd, "fstrim") == {"paths": []}


def test_statistics(herd: HerdUnderTest) -> None:
    [before] = lines(herd, "cat /proc/diskstats")
    [disk] = get(herd, "get-diskstats")["disks"]
    [after] = lines(herd, "cat /proc/diskstats")
    assert [disk["major"], disk["minor"], disk["name"]] == before[:3]
    assert int(before[3]) <= int(disk["stats"]["readIos"]) <= int(after[3])
    assert int(before[5]) <= int(disk["stats"]["readSectors"]) <= int(after[5])

    before, after_script = lines(herd, "grep '^cpu1 ' /proc/stat")[0], "grep '^cpu1 ' /proc/stat"
    cpus = {it["cpu"]: it for it in get(herd, "get-cpustats")["cpus"]}
    after = lines(herd, after_script)[0]
    assert set(cpus) == {"0", "1"}
    assert cpus["1"]["type"] == "LINUX"
    # Not the idle time, which Linux may count backwards on another processor than its own.
    for name, low, high in zip(("user", "nice", "system"), before[1:], after[1:], strict=False):
        assert int(low) * 10 <= int(cpus["1"][name]) <= int(high) * 10  # Linux counts in hundredths of a second


def test_who_and_what_it_is(herd: HerdUnderTest) -> None:
    assert get(herd, "get-host-name") == {"hostName": herd.shell("hostname").strip()}
    assert get(herd, "get-users") == {"users": []}
    assert get(herd, "get-timezone") == {"zone": "UTC", "offset": "0"}
    system = get(herd, "get-osinfo")
    assert system["kernelRelease"] == herd.shell("uname -r").strip()
    assert system["kernelVersion"] == herd.shell("uname -v").strip()
    assert system["machine"] == herd.shell("uname -m").strip()
    assert system["prettyName"] == herd.shell('. /etc/os-release; echo "$PRETTY_NAME"').strip()
    assert "variant" not in system


def test_ssh_keys_come_and_go(herd: HerdUnderTest) -> None:
    first, second = ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFirst a@b", "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABSecond c@d")
    file = "cat /root/.ssh/authorized_keys"
    assert post(herd, "ssh-add-authorized-keys", username="root", keys=[first, second]) == {}
    assert set(get(herd, "ssh-get-authorized-keys", username="root")["keys"]) == {first, second}
    assert herd.shell(file).splitlines() == [first, second]
    assert post(herd, "ssh-remove-authorized-keys", username="root", keys=[first, "ssh-rsa other"]) == {}
    assert get(herd, "ssh-get-authorized-keys", username="root") == {"keys": [second]}
    assert post(herd, "ssh-add-authorized-keys", username="root", keys=[first], reset=True) == {}
    assert herd.shell(file).splitlines() == [first]
    assert post(herd, "ssh-add-authorized-keys", username="root", keys=[], reset=True) == {}
    assert get(herd, "ssh-get-authorized-keys", username="root") == {"keys": []}


def test_a_freeze_of_nothing(herd: HerdUnderTest) -> None:
    assert post(herd, "fsfreeze-freeze", thawAfter="5s") == {"frozen": "0"}
    assert post(herd, "fsfreeze-freeze-list", mountpoints=["/nonexistent"]) == {"frozen": "0"}
    assert get(herd, "fsfreeze-status") == {"status": "THAWED"}
    assert post(herd, "fsfreeze-thaw") == {"thawed": "0"}


@pytest.mark.parametrize(
    ("method", "command", "fields", "code", "why"),
    [
        ("GET", "get-load", {}, 501, "AGENT_COMMAND_NOT_FOUND"),
        ("GET", "network-get-route", {}, 501, "AGENT_COMMAND_NOT_FOUND"),
        ("POST", "suspend-hybrid", {}, 409, "AGENT_COMMAND_FAILED"),
        ("POST", "set-user-password", {"username": "root", "password": "eA=="}, 409, "AGENT_COMMAND_FAILED"),
        ("POST", "execute", {"command": "guest-make-coffee"}, 501, "AGENT_COMMAND_NOT_FOUND"),
        ("POST", "execute", {"command": "make coffee"}, 400, "INVALID_ARGUMENT"),
        ("POST", "execute", {"command": "guest-ping", "argumentsJson": "{]"}, 400, "INVALID_ARGUMENT"),
        (
            "POST",
            "execute",
            {"command": "guest-file-read", "argumentsJson": '{"handle": 1000, "count": 50000000}'},
            400,
            "INVALID_ARGUMENT",
        ),
        ("POST", "execute", {"command": "guest-file-close"}, 409, "AGENT_COMMAND_FAILED"),
        ("POST", "exec", {"path": "true", "captureOutputMode": "MERGED"}, 409, "AGENT_COMMAND_FAILED"),
        ("POST", "exec", {"path": "/nonexistent"}, 409, "AGENT_COMMAND_FAILED"),
        ("POST", "file-open", {"path": "/nonexistent"}, 409, "AGENT_COMMAND_FAILED"),
        ("POST", "file-open", {}, 400, "INVALID_ARGUMENT"),
        ("GET", "ssh-get-authorized-keys", {}, 400, "INVALID_ARGUMENT"),
        ("POST", "file-open", {"path": "/tmp/a\0b"}, 400, "INVALID_ARGUMENT"),
        ("POST", "file-read", {"handle": 1000, "count": 33554433}, 400, "INVALID_ARGUMENT"),
        ("POST", "file-seek", {"handle": 1000}, 400, "INVALID_ARGUMENT"),
        ("POST", "file-seek", {"handle": 1000, "whenceName": "MIDDLE"}, 400, "INVALID_ARGUMENT"),
        ("POST", "file-write", {"handle": 1000, "bufB64": "not base64"}, 400, "INVALID_ARGUMENT"),
        ("POST", "shutdown", {"mode": "SLEEP"}, 400, "INVALID_ARGUMENT"),
        ("POST", "fsfreeze-freeze", {"thawAfter": "7200s"}, 400, "INVALID_ARGUMENT"),
        ("POST", "set-time", {"time": str(2**63)}, 400, "INVALID_ARGUMENT"),
    ],
)
def test_what_cannot_be_says_why(
    herd: HerdUnderTest, method: str, command: str, fields: dict[str, Any], code: int, why: str
) -> None:
    response = herd.http.request(
        method, f"/v1/instances/web/guest/{command}", json=fields if method == "POST" else None
    )
    assert (response.status_code, reason(response)) == (code, why), response.text


def test_any_command_can_be_called_in_json(herd: HerdUnderTest, client: Client) -> None:
    def execute(command: str, arguments: object = None) -> Any:
        text = "" if arguments is None else json.dumps(arguments)
        return json.loads(post(herd, "execute", command=command, argumentsJson=text)["resultJson"])

    assert execute("guest-ping") == {}
    assert execute("guest-sync", {"id": INT64_MAX}) == INT64_MAX
    assert execute("guest-get-host-name", {}) == {"host-name": "web"}
    answer = client.guest.Execute(
        pb.GuestExecuteRequest(name="web", command="guest-sync", arguments_json=f'{{"id": {-(2**63)}}}')
    )
    assert answer.result_json == str(-(2**63))


def test_a_word_that_does_not_exist_is_refused_over_grpc_too(client: Client) -> None:
    request = pb.GuestShutdownRequest(name="web")
    request.mode = 7  # type: ignore[assignment]  # protobuf lets any number pass
    with pytest.raises(InvalidArgument, match="mode: must be one of HALT, POWERDOWN, REBOOT, is 7"):
        client.guest.Shutdown(request)


def test_what_changes_the_guest_is_no_get(herd: HerdUnderTest) -> None:
    for command in ("shutdown", "exec-status", "file-read", "fsfreeze-thaw", "execute"):
        assert herd.http.get(f"/v1/instances/web/guest/{command}").status_code == 405
