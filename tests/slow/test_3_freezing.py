"""Freezing a guest's file systems: what waits, what is refused, and that it always ends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.framework.console import Console
from tests.framework.debian_guest import TEST_TIMEOUT_S
from tests.framework.herd import HerdUnderTest
from tests.framework.refusals import refused

pytestmark = [pytest.mark.timeout(TEST_TIMEOUT_S), pytest.mark.usefixtures("as_found")]


def freeze(herd: HerdUnderTest, **arguments: Any) -> int:
    return int(herd.ask("POST", "web/guest/fsfreeze-freeze", **arguments)["frozen"])


def thaw(herd: HerdUnderTest) -> int:
    return int(herd.ask("POST", "web/guest/fsfreeze-thaw")["thawed"])


def status(herd: HerdUnderTest) -> str | None:
    """The agent's own word; None while nobody can be asked."""
    answer: str | None = herd.http.get("/v1/instances/web/guest/fsfreeze-status").json().get("status")
    return answer


def write(path: str) -> str:
    """A shell's line that writes a file, and says when it has to wait for that and when it is through."""
    waits = 'until grep -q "^State:.D" /proc/$!/status; do :; done; echo it wai""ts'
    return f'echo content >{path} & {waits}; wait; echo it is th""rough'


def test_a_write_waits_for_the_thaw(debian: HerdUnderTest, second: str, console: Console) -> None:
    assert debian.ask("POST", "web/guest/fsfreeze-freeze-list", mountpoints=[second]) == {"frozen": "1"}
    assert status(debian) == "FROZEN"
    console.type(write(f"{second}/waited"))
    console.hear("it waits")
    assert thaw(debian) == 1
    console.hear("it is through")
    assert status(debian) == "THAWED"
    assert debian.shell(f"cat {second}/waited") == "content\n"


def test_a_file_system_that_was_not_asked_for_stays_as_it_is(
    debian: HerdUnderTest, second: str, console: Console
) -> None:
    debian.ask("POST", "web/guest/fsfreeze-freeze-list", mountpoints=[second])
    console.type('echo content >/var/tmp/direct && sync -f /var/tmp && echo it is th""rough')
    console.hear("it is through")
    assert thaw(debian) == 1
    assert debian.shell("cat /var/tmp/direct && rm /var/tmp/direct") == "content\n"


def test_a_frozen_guest_says_so_at_once(debian: HerdUnderTest, second: str) -> None:
    assert second in debian.shell("cat /proc/mounts")
    assert freeze(debian) == 2
    assert "frozenUntil" in debian.info()
    web = "/v1/instances/web"
    answers = [
        debian.http.get(f"{web}/guest/get-osinfo"),
        debian.http.post(f"{web}/guest/fstrim", json={}),
        debian.http.post(f"{web}/guest/fsfreeze-freeze", json={}),
        debian.http.post(f"{web}/run", json={"command": ["true"]}),
    ]
    for response in answers:
        refused(response, 400, "FAILED_PRECONDITION", "AGENT_FROZEN", "frozen")
    for command in ("ping", "info"):
        assert debian.http.get(f"{web}/guest/{command}").status_code == 200
    assert status(debian) == "FROZEN"
    assert thaw(debian) == 2
    assert "frozenUntil" not in debian.info()
    assert thaw(debian) == 0


def test_a_mount_point_that_is_none_freezes_nothing(debian: HerdUnderTest) -> None:
    assert debian.ask("POST", "web/guest/fsfreeze-freeze-list", mountpoints=["/etc"]) == {"frozen": "0"}
    assert status(debian) == "THAWED"
    debian.eventually(lambda: "frozenUntil" not in debian.info())


def test_a_freeze_ends_when_its_time_is_over(debian: HerdUnderTest, console: Console) -> None:
    freeze(debian, thawAfter="15s")
    console.type(write("/var/tmp/waited"))
    console.hear("it waits")
    console.hear("it is through")
    debian.eventually(lambda: status(debian) == "THAWED" and "frozenUntil" not in debian.info())
    debian.shell("rm /var/tmp/waited")


def test_a_freeze_ends_also_when_the_controller_was_killed(debian: HerdUnderTest, console: Console) -> None:
    freeze(debian, thawAfter="30s")
    until = debian.info()["frozenUntil"]
    console.type(write("/var/tmp/waited"))
    console.hear("it waits")
    debian.restart("controller")
    debian.wait_ready()
    assert debian.info()["frozenUntil"] == until
    console.hear("it is through")
    debian.eventually(lambda: status(debian) == "THAWED" and "frozenUntil" not in debian.info())
    debian.shell("rm /var/tmp/waited")
