"""What the agent's commands tell of a guest, against what the guest says itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S, USER
from tests.framework.herd import HerdUnderTest
from tests.framework.refusals import refused

pytestmark = [pytest.mark.timeout(TEST_TIMEOUT_S), pytest.mark.usefixtures("as_found")]

CLOCK_TICK_MS = 10


def tell(herd: HerdUnderTest, command: str) -> Any:
    """The answer to one of the agent's commands; the value itself where the response has but one field."""
    answer = herd.ask("GET", f"web/guest/{command}")
    return next(iter(answer.values())) if len(answer) == 1 else answer


def by_name(items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert len({item["name"] for item in items}) == len(items)
    return {item["name"]: item for item in items}


def test_get_fsinfo(debian: HerdUnderTest, second: str) -> None:
    told = {each["mountpoint"]: each for each in tell(debian, "get-fsinfo")}
    columns = "--output=source,target,fstype,size,used"
    seen = debian.shell(f"df --block-size=1 --local --type=ext4 {columns} | tail --lines=+2").splitlines()
    assert sorted(told) == sorted(line.split()[1] for line in seen) == ["/", second]
    for source, mountpoint, kind, _, _ in map(str.split, seen):
        assert (f"/dev/{told[mountpoint]['name']}", told[mountpoint]["type"]) == (source, kind)
    # Its total is what an ordinary user can have: df shows that as what is used and what is available.
    used, available = debian.shell(f"stat --file-system --format='%b %f %a %S' {second} | {USED}").split()
    assert int(told[second]["usedBytes"]) == int(used)
    assert int(told[second]["totalBytes"]) == int(used) + int(available)
    [disk] = told["/"]["disk"]
    assert (disk["busType"], disk["dev"]) == ("VIRTIO", "/dev/vda")
    assert told[second]["disk"] == []


USED = "while read blocks free available size; do echo $(((blocks - free) * size)) $((available * size)); done"


def test_get_disks(debian: HerdUnderTest, second: str) -> None:
    told = by_name(tell(debian, "get-disks"))
    seen = json.loads(debian.shell("lsblk --json --list --paths --output NAME,TYPE,PKNAME"))["blockdevices"]
    assert sorted(told) == sorted(each["name"] for each in seen) == ["/dev/loop0", "/dev/loop0p1", "/dev/vda"]
    for each in seen:
        assert told[each["name"]]["partition"] == (each["type"] == "part")
        assert told[each["name"]]["dependencies"] == ([each["pkname"]] if each["type"] == "part" else [])
    assert "address" not in told["/dev/loop0"]
    pci = told["/dev/vda"]["address"]["pciController"]
    device = f"{pci['domain']:>04}:{int(pci['bus']):02x}:{int(pci['slot']):02x}.{pci['function']}"
    assert device in debian.shell("readlink --canonicalize /sys/block/vda")


def test_get_users(debian: HerdUnderTest) -> None:
    [user] = tell(debian, "get-users")
    assert debian.shell("who").split()[0] == user["user"] == USER
    login = debian.shell(f"date --date=@{user['loginTime']} '+%Y-%m-%d %H:%M'").strip()
    assert login in debian.shell("who")


@pytest.mark.parametrize(
    ("zone", "abbreviation", "offset"), [("Etc/UTC", "UTC", 0), ("Asia/Kathmandu", "+0545", 20700)]
)
def test_get_timezone(debian: HerdUnderTest, zone: str, abbreviation: str, offset: int) -> None:
    debian.shell(f"ln --symbolic --force --no-dereference /usr/share/zoneinfo/{zone} /etc/localtime")
    try:
        assert debian.shell("date +%Z").strip() == abbreviation
        assert debian.ask("GET", "web/guest/get-timezone") == {"zone": abbreviation, "offset": str(offset)}
    finally:
        debian.shell("ln --symbolic --force --no-dereference /usr/share/zoneinfo/Etc/UTC /etc/localtime")


def test_get_osinfo(debian: HerdUnderTest) -> None:
    told = debian.ask("GET", "web/guest/get-osinfo")
    release, version, machine = debian.shell(
        "uname --kernel-release; uname --kernel-version; uname --machine"
    ).splitlines()
    assert (told.pop("kernelRelease"), told.pop("kernelVersion"), told.pop("machine")) == (release, version, machine)
    words = "id name prettyName version versionId"
    script = '. /etc/os-release; printf "%s\\n" "$ID" "$NAME" "$PRETTY_NAME" "$VERSION" "$VERSION_ID"'
    assert told == dict(zip(words.split(), debian.shell(script).splitlines(), strict=True))


def test_get_host_name(debian: HerdUnderTest) -> None:
    assert tell(debian, "get-host-name") == debian.shell("uname --nodename").strip() == "debian"
    debian.shell("hostnamectl set-hostname other")
    try:
        assert tell(debian, "get-host-name") == "other"
    finally:
        debian.shell("hostnamectl set-hostname debian")


def test_network_get_interfaces(debian: HerdUnderTest) -> None:
    told = by_name(tell(debian, "network-get-interfaces"))
    seen = by_name([{**each, "name": each["ifname"]} for each in json.loads(debian.shell("ip -json address"))])
    assert told.keys() == seen.keys()
    families = {"inet": "IPV4", "inet6": "IPV6"}
    for name, interface in seen.items():
        assert told[name]["hardwareAddress"] == interface["address"]
        addresses = {(it["ipAddress"], it["ipAddressType"], int(it["prefix"])) for it in told[name]["ipAddresses"]}
        assert addresses == {(it["local"], families[it["family"]], it["prefixlen"]) for it in interface["addr_info"]}
        assert {"ipAddress": "127.0.0.1", "ipAddressType": "IPV4", "prefix": "8"} in told["lo"]["ipAddresses"]


def test_the_counters_of_an_interface(debian: HerdUnderTest) -> None:
    def counters() -> dict[str, int]:
        told = by_name(tell(debian, "network-get-interfaces"))["lo"]["statistics"]
        return {name: int(value) for name, value in told.items()}

    before = counters()
    debian.shell("ping -c 3 -i 0.01 -s 1000 127.0.0.1 >/dev/null")
    after = counters()
    packets = 3 * 2  # on the loopback, requests and answers are sent and received
    size_bytes = 1000 + 8 + 20  # with the headers of ICMP and IP
    for direction in ("rx", "tx"):
        assert after[f"{direction}Packets"] - before[f"{direction}Packets"] == packets
        assert after[f"{direction}Bytes"] - before[f"{direction}Bytes"] == packets * size_bytes
        assert after[f"{direction}Errs"] == after[f"{direction}Dropped"] == 0


def test_get_vcpus(debian: HerdUnderTest) -> None:
    told = {int(each["logicalId"]): each for each in tell(debian, "get-vcpus")}
    assert debian.shell("cat /sys/devices/system/cpu/online").strip() == "0-1"
    assert {number: (each["online"], each["canOffline"]) for number, each in told.items()} == {
        0: (True, False),
        1: (True, True),
    }


def test_get_memory_blocks(debian: HerdUnderTest) -> None:
    told = {int(each["physIndex"]): each["online"] for each in tell(debian, "get-memory-blocks")}
    files = debian.shell("cd /sys/devices/system/memory; grep --with-filename '' memory*/state").splitlines()
    seen = (line.removeprefix("memory").split("/state:") for line in files)
    assert told == {int(number): state == "online" for number, state in seen}
    size_bytes = int(debian.shell("cat /sys/devices/system/memory/block_size_bytes"), base=16)
    assert tell(debian, "get-memory-block-info") == str(size_bytes)
    assert len(told) * size_bytes == debian.info()["hardware"]["memoryMib"] << 20


def test_get_diskstats(debian: HerdUnderTest) -> None:
    before = by_name(tell(debian, "get-diskstats"))["vda"]
    assert f"{before['major']}:{before['minor']}" == debian.shell("cat /sys/block/vda/dev").strip()
    debian.shell("dd if=/dev/zero of=/srv/written bs=1M count=8 conv=fsync status=none && rm /srv/written")
    after = by_name(tell(debian, "get-diskstats"))["vda"]
    seen = debian.shell("cat /sys/block/vda/stat").split()
    assert int(after["stats"]["writeSectors"]) - int(before["stats"]["writeSectors"]) >= (8 << 20) // 512
    # The fields of https://docs.kernel.org/block/stat.html, in its order. Reading goes on while this is compared.
    for field, value in zip(("readIos", "readMerges", "readSectors"), seen, strict=False):
        assert int(before["stats"][field]) <= int(after["stats"][field]) <= int(value)


def test_get_cpustats(debian: HerdUnderTest) -> None:
    fields = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guestnice"]

    def seen() -> dict[int, list[int]]:
        lines = debian.shell("grep '^cpu[0-9]' /proc/stat").splitlines()
        return {
            int(line.split()[0].removeprefix("cpu")): [int(ticks) * CLOCK_TICK_MS for ticks in line.split()[1:]]
            for line in lines
        }

    before, told, after = seen(), tell(debian, "get-cpustats"), seen()
    assert sorted(int(each["cpu"]) for each in told) == [0, 1]
    for each in told:
        assert each["type"] == "LINUX"
        at_first, at_last = before[int(each["cpu"])], after[int(each["cpu"])]
        for field, low, high in zip(fields, at_first, at_last, strict=True):
            assert low <= int(each[field]) <= high, field


def test_get_time(debian: HerdUnderTest) -> None:
    before = int(debian.shell("date +%s%N"))
    told = int(tell(debian, "get-time"))
    assert before < told < int(debian.shell("date +%s%N"))


def test_what_this_agent_does_not_have(debian: HerdUnderTest) -> None:
    for command in ("get-load", "network-get-route"):
        response = debian.http.get(f"/v1/instances/web/guest/{command}")
        refused(response, 501, "UNIMPLEMENTED", "AGENT_COMMAND_NOT_FOUND", f"guest-{command}")
    # This one is for Windows. Agents before 10.0 have it everywhere, and disable it where it does not work.
    response = debian.http.get("/v1/instances/web/guest/get-devices")
    refused(response, 403, "PERMISSION_DENIED", "AGENT_COMMAND_DISABLED", "guest-get-devices")
