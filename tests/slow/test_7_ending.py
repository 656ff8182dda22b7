"""How a real distribution goes down. These tests end the machine that all others share, and start it again."""

from __future__ import annotations

import pytest

from tests.framework.debian_guest import BOOT_TIMEOUT_S, TEST_TIMEOUT_S
from tests.framework.herd import HerdUnderTest

pytestmark = pytest.mark.timeout(TEST_TIMEOUT_S)


def test_reboot(debian: HerdUnderTest) -> None:
    before, boot_id = debian.info(), debian.boot_id()
    debian.shell("echo kept >/srv/kept")
    assert debian.ask("POST", "web/guest/shutdown", mode="REBOOT") == {}
    debian.eventually(lambda: debian.http.get("/v1/instances/web/guest/ping").status_code == 200, BOOT_TIMEOUT_S)
    assert debian.boot_id() != boot_id
    after = debian.info()
    assert (after["state"], after["generation"]) == ("RUNNING", before["generation"])
    assert debian.shell("cat /srv/kept && rm /srv/kept") == "kept\n"


def test_stop_of_a_frozen_guest(debian: HerdUnderTest) -> None:
    """It is thawed for that, or it would never come to unmount its disk."""
    debian.ask("POST", "web/guest/fsfreeze-freeze")
    stopped = debian.ask("POST", "web/stop", grace=f"{BOOT_TIMEOUT_S:g}s")
    assert (stopped["state"], stopped["lastExit"]["stopStep"]) == ("STOPPED", "AGENT")
    assert "frozenUntil" not in stopped


def test_powerdown(debian: HerdUnderTest) -> None:
    debian.ask("POST", "web/start")
    debian.wait(timeout_s=BOOT_TIMEOUT_S)
    assert debian.shell("journalctl --boot=-1 --output=cat | grep --count 'Reached target.*poweroff.target'") == "1\n"
    assert debian.ask("POST", "web/guest/shutdown", mode="POWERDOWN") == {}
    stopped = debian.wait(until="STOPPED", timeout_s=BOOT_TIMEOUT_S)
    assert (stopped["state"], stopped["lastExit"]["cause"]) == ("STOPPED", "GUEST_SHUTDOWN")
