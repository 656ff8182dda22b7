"""A guest that suspends itself, and is woken."""

from __future__ import annotations

import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S
from tests.framework.herd import HerdUnderTest
from tests.framework.refusals import refused

pytestmark = [pytest.mark.timeout(TEST_TIMEOUT_S), pytest.mark.usefixtures("as_found")]

PING = "/v1/instances/web/guest/ping"


def count_of(herd: HerdUnderTest, words: str) -> int:
    """How often the guest's kernel has said this."""
    return int(herd.shell(f"dmesg | grep --count '{words}' || true"))


def test_a_guest_sleeps_until_it_is_woken(debian: HerdUnderTest) -> None:
    """QEMU 7.2 wakes a guest on q35 at once when it suspends itself a second time, so this is the only one to do it."""
    before = count_of(debian, "PM: suspend exit")
    with debian.agent_coming_back():
        assert debian.ask("POST", "web/guest/suspend-ram") == {}
        assert debian.info()["state"] == "SUSPENDED"
        refused(debian.http.get(PING), 400, "FAILED_PRECONDITION", "ILLEGAL_STATE", "SUSPENDED")
        debian.restart("controller")
        debian.wait_ready()
        debian.eventually(lambda: debian.info()["state"] == "SUSPENDED")
        assert debian.ask("POST", "web/resume")["state"] == "RUNNING"
    assert count_of(debian, "PM: suspend exit") == before + 1
    assert debian.shell("cat /sys/devices/system/cpu/online").strip() == "0-1"


def test_a_guest_that_has_no_swap_to_save_its_memory_in(debian: HerdUnderTest) -> None:
    with debian.agent_coming_back():
        response = debian.http.post("/v1/instances/web/guest/suspend-disk", json={})
    refused(response, 409, "ABORTED", "AGENT_COMMAND_FAILED", "suspend")
    assert debian.info()["state"] == "RUNNING"


def test_a_guest_that_knows_no_hybrid_suspend(debian: HerdUnderTest) -> None:
    response = debian.http.post("/v1/instances/web/guest/suspend-hybrid", json={})
    refused(response, 409, "ABORTED", "AGENT_COMMAND_FAILED", "suspend")
    assert debian.info()["state"] == "RUNNING"
