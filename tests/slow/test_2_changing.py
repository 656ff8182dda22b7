"""What the agent's commands change in a guest, as the guest shows it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S, USER
from tests.framework.herd import HerdUnderTest
from tests.framework.refusals import refused, violations

pytestmark = [pytest.mark.timeout(TEST_TIMEOUT_S), pytest.mark.usefixtures("as_found")]

PASSWORD = "tr0mbone & käse"
KEYS = [f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{letter * 43} {letter}@example" for letter in "ABC"]
KEYS_FILE = f"/home/{USER}/.ssh/authorized_keys"
MEMORY = "/sys/devices/system/memory"


def post(herd: HerdUnderTest, command: str, **arguments: Any) -> httpx.Response:
    return herd.http.post(f"/v1/instances/web/guest/{command}", json=arguments)


def ask(herd: HerdUnderTest, command: str, **arguments: Any) -> dict[str, Any]:
    return herd.ask("POST", f"web/guest/{command}", **arguments)


def refused_by_agent(response: httpx.Response, *words: str) -> None:
    refused(response, 409, "ABORTED", "AGENT_COMMAND_FAILED", *words)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def no_password(debian: HerdUnderTest) -> Iterator[None]:
    """The user has no password, before and after."""
    assert shadow(debian) == "!"
    yield
    debian.shell(f"usermod --password '!' {USER}")


def shadow(herd: HerdUnderTest) -> str:
    return herd.shell(f"getent shadow {USER}").split(":")[1]


def crypted(herd: HerdUnderTest, password: str, setting: str) -> str:
    """What crypt(3) makes of a password in the guest."""
    result = herd.run("perl", "-e", "print crypt($ARGV[0], $ARGV[1])", password, setting)
    return str(result["stdout"])


@pytest.mark.usefixtures("no_password")
def test_a_plain_password(debian: HerdUnderTest) -> None:
    assert ask(debian, "set-user-password", username=USER, password=encoded(PASSWORD)) == {}
    stored = shadow(debian)
    assert stored.startswith("$y$")
    assert crypted(debian, PASSWORD, stored) == stored
    assert crypted(debian, "another", stored) != stored


@pytest.mark.usefixtures("no_password")
def test_a_crypted_password(debian: HerdUnderTest) -> None:
    hashed = crypted(debian, PASSWORD, "$6$salt$")
    assert ask(debian, "set-user-password", username=USER, password=encoded(hashed), crypted=True) == {}
    assert shadow(debian) == hashed


@pytest.mark.usefixtures("no_password")
def test_a_password_that_cannot_be_set(debian: HerdUnderTest) -> None:
    refused_by_agent(post(debian, "set-user-password", username="nobody-here", password=encoded(PASSWORD)), "password")
    response = post(debian, "set-user-password", username=USER, password=encoded("cut\0short"))
    status = refused(response, 400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "NUL")
    assert list(violations(status)) == ["password"]
    assert shadow(debian) == "!"


@pytest.fixture
def no_keys(debian: HerdUnderTest) -> Iterator[None]:
    """The user has no authorized keys, before and after."""
    debian.shell(f"test ! -e {KEYS_FILE}")
    yield
    debian.shell(f"rm --recursive --force /home/{USER}/.ssh")


def authorized(herd: HerdUnderTest) -> list[str]:
    """The keys in the user's file, once the agent has told the same."""
    told = herd.ask("GET", f"web/guest/ssh-get-authorized-keys?username={USER}")["keys"]
    seen = herd.shell(f"cat {KEYS_FILE}").splitlines()
    assert sorted(told) == sorted(seen)
    return sorted(seen)


@pytest.mark.usefixtures("no_keys")
def test_ssh_keys_come_and_go(debian: HerdUnderTest) -> None:
    ask(debian, "ssh-add-authorized-keys", username=USER, keys=KEYS[:2])
    assert authorized(debian) == KEYS[:2]
    owner_and_mode = debian.shell(f"stat --format='%U %a' /home/{USER}/.ssh {KEYS_FILE}").splitlines()
    assert owner_and_mode == [f"{USER} 700", f"{USER} 600"]
    ask(debian, "ssh-add-authorized-keys", username=USER, keys=KEYS[1:])
    assert authorized(debian) == KEYS
    ask(debian, "ssh-remove-authorized-keys", username=USER, keys=[KEYS[0], "ssh-ed25519 never-there"])
    assert authorized(debian) == KEYS[1:]
    ask(debian, "ssh-add-authorized-keys", username=USER, keys=KEYS[:1], reset=True)
    assert authorized(debian) == KEYS[:1]


@pytest.mark.usefixtures("no_keys")
def test_ssh_keys_that_are_not_to_be_had(debian: HerdUnderTest) -> None:
    get = "/v1/instances/web/guest/ssh-get-authorized-keys"
    refused_by_agent(debian.http.get(get, params={"username": USER}), "No such file")
    refused_by_agent(debian.http.get(get, params={"username": "nobody-here"}), "nobody-here")
    refused_by_agent(post(debian, "ssh-add-authorized-keys", username="nobody-here", keys=KEYS), "nobody-here")
    refused_by_agent(post(debian, "ssh-add-authorized-keys", username=USER, keys=["two\nlines"]), "key")
    # A key that is not there is no error, not even where there is none at all.
    assert ask(debian, "ssh-remove-authorized-keys", username=USER, keys=KEYS) == {}


def test_a_processor_goes_offline_and_comes_back(debian: HerdUnderTest) -> None:
    for online, seen in ((False, "0"), (True, "0-1")):
        assert ask(debian, "set-vcpus", vcpus=[{"logicalId": 1, "online": online}]) == {"processed": "1"}
        assert debian.shell("cat /sys/devices/system/cpu/online").strip() == seen
        told = {each["logicalId"]: each["online"] for each in debian.ask("GET", "web/guest/get-vcpus")["vcpus"]}
        assert told == {"0": True, "1": online}


def test_processors_that_stay_as_they_are(debian: HerdUnderTest) -> None:
    refused_by_agent(post(debian, "set-vcpus", vcpus=[{"logicalId": 0, "online": False}]), "#0")
    refused_by_agent(post(debian, "set-vcpus", vcpus=[{"logicalId": 9, "online": False}]), "9")
    # The first of the two is done when the second fails, and the answer says how many were.
    both = [{"logicalId": 1, "online": True}, {"logicalId": 0, "online": False}]
    assert ask(debian, "set-vcpus", vcpus=both) == {"processed": "1"}
    assert debian.shell("cat /sys/devices/system/cpu/online").strip() == "0-1"


def test_a_memory_block_goes_offline_and_comes_back(debian: HerdUnderTest) -> None:
    """Any one that the guest can do without just now: the kernel keeps those in which it has something of its own."""
    blocks = [int(block["physIndex"]) for block in debian.ask("GET", "web/guest/get-memory-blocks")["memBlks"]]
    total_kib = memory_kib(debian)
    size_kib = int(debian.ask("GET", "web/guest/get-memory-block-info")["size"]) >> 10
    block = next(block for block in sorted(blocks, reverse=True) if set_block(debian, block, False) == "SUCCESS")
    try:
        assert debian.shell(f"cat {MEMORY}/memory{block}/state").strip() == "offline"
        assert memory_kib(debian) == total_kib - size_kib
    finally:
        assert set_block(debian, block, True) == "SUCCESS"
    assert debian.shell(f"cat {MEMORY}/memory{block}/state").strip() == "online"
    assert memory_kib(debian) == total_kib


def set_block(herd: HerdUnderTest, block: int, online: bool) -> str:
    [response] = ask(herd, "set-memory-blocks", memBlks=[{"physIndex": block, "online": online}])["responses"]
    assert response["physIndex"] == str(block)
    assert ("errorCode" in response) == (response["response"] != "SUCCESS")
    return str(response["response"])


def memory_kib(herd: HerdUnderTest) -> int:
    return int(herd.shell("awk '/^MemTotal:/ { print $2 }' /proc/meminfo"))


def test_a_memory_block_that_is_not_there(debian: HerdUnderTest) -> None:
    assert set_block(debian, 999, True) == "NOT_FOUND"


def test_the_clock_is_set(debian: HerdUnderTest) -> None:
    def clocks() -> tuple[int, int]:
        system, hardware = debian.shell('date +%s; date --date="$(hwclock --utc --get)" +%s').splitlines()
        return int(system), int(hardware)

    ahead_s = 3000
    before_s, _ = clocks()
    ask(debian, "set-time", time=str((before_s + ahead_s) * 10**9))
    for clock_s in clocks():
        assert ahead_s <= clock_s - before_s < 2 * ahead_s
    debian.shell(f"hwclock --utc --set --date=\"$(date --utc --date=@{before_s} '+%F %T')\"")
    # Without a time it is the hardware clock's.
    ask(debian, "set-time")
    for clock_s in clocks():
        assert 0 <= clock_s - before_s < ahead_s


def test_fstrim(debian: HerdUnderTest, second: str) -> None:
    # What was trimmed once is not trimmed again before something else was there.
    ask(debian, "fstrim")
    size_bytes = 8 << 20
    debian.shell(f"dd if=/dev/zero of={second}/gone bs=1M count=8 conv=fsync status=none; rm {second}/gone; sync")
    paths = {each["path"]: each for each in ask(debian, "fstrim")["paths"]}
    assert sorted(paths) == ["/", second]
    assert int(paths[second]["trimmed"]) >= size_bytes
    paths = {each["path"]: each for each in ask(debian, "fstrim", minimum=str(1 << 20))["paths"]}
    assert (paths[second]["minimum"], paths[second]["trimmed"]) == (str(1 << 20), "0")
