"""What the guest's admin does with the agent: commands that are disabled, an agent that is stopped."""

from __future__ import annotations

import pytest

from tests.framework.console import Console
from tests.framework.debian_guest import TEST_TIMEOUT_S
from tests.framework.herd import HerdUnderTest
from tests.framework.refusals import refused

pytestmark = [pytest.mark.timeout(TEST_TIMEOUT_S), pytest.mark.usefixtures("as_found")]

SETTINGS = "/etc/qemu/qemu-ga.conf"
OSINFO = "/v1/instances/web/guest/get-osinfo"


def systemctl(herd: HerdUnderTest, verb: str) -> None:
    """Tells the guest's systemd what to do with the agent, which may be gone before it can answer."""
    command = ["systemctl", "--no-block", verb, "qemu-guest-agent"]
    herd.http.post("/v1/instances/web/run", json={"command": command, "timeout": "20s"})


def test_a_command_that_the_admin_disabled(debian: HerdUnderTest) -> None:
    before = debian.ask("GET", "web/guest/get-osinfo")
    debian.shell(f"printf '[general]\\nblacklist=guest-get-osinfo,guest-get-users\\n' >{SETTINGS}")
    with debian.agent_coming_back():
        systemctl(debian, "restart")
    try:
        response = debian.http.get(OSINFO)
        refused(response, 403, "PERMISSION_DENIED", "AGENT_COMMAND_DISABLED", "guest-get-osinfo")
        commands = debian.ask("GET", "web/guest/info")["supportedCommands"]
        disabled = {each["name"] for each in commands if not each["enabled"]}
        assert disabled == {"guest-get-osinfo", "guest-get-users", "guest-get-devices"}
    finally:
        debian.shell(f"rm {SETTINGS}")
        with debian.agent_coming_back():
            systemctl(debian, "restart")
    # What was known of the earlier agent does not hold for this one.
    assert debian.ask("GET", "web/guest/get-osinfo") == before


def test_an_agent_that_is_stopped_and_started_again(debian: HerdUnderTest, console: Console) -> None:
    starter = ["systemd-run", "--quiet", "--path-property=PathExists=/tmp/start-agent"]
    debian.run(*starter, "sh", "-c", "rm /tmp/start-agent; systemctl start qemu-guest-agent")
    with debian.agent_coming_back():
        systemctl(debian, "stop")
        try:
            debian.eventually(lambda: debian.http.get(OSINFO).status_code == 503)
            refused(debian.http.get(OSINFO), 503, "UNAVAILABLE", "AGENT_NOT_RUNNING", "agent")
            assert debian.info()["state"] == "RUNNING"
        finally:
            console.type("touch /tmp/start-agent")
    assert debian.http.get(OSINFO).status_code == 200


def test_an_agent_that_is_stopped_in_the_middle_of_a_call(debian: HerdUnderTest) -> None:
    """The command was already running when the agent went, so nobody knows what became of it."""
    script = "systemctl --no-block restart qemu-guest-agent; sleep 1000"
    with debian.agent_coming_back():
        response = debian.http.post("/v1/instances/web/run", json={"command": ["sh", "-c", script]})
    refused(response, 504, "DEADLINE_EXCEEDED", "COMMAND_UNFINISHED", "outcome unknown")
