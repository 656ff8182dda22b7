"""The host reboots: machines are stopped in good order where that was asked for, and start again."""

from __future__ import annotations

import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S
from tests.systemd.hypervisor import LAUNCH_TIMEOUT_S, SERVICES, Hypervisor

pytestmark = pytest.mark.timeout(2 * TEST_TIMEOUT_S)

ORDER = ("vmherd-guests", "vmherd-controller", "vmherd-qemu")
"""What has to be stopped before what, when the host shuts down."""


def test_machines_start_with_the_host(host: Hypervisor) -> None:
    before = host.life("inner")
    host.reboot()
    assert set(host.shell(f"systemctl is-active vmherd.target {' '.join(SERVICES)}").split()) == {"active"}
    host.vmherd(f"wait inner --until agent --timeout {LAUNCH_TIMEOUT_S:g}")
    assert host.life("inner")[1] != before[1]


def test_an_orderly_stop_before_the_host_goes_down(host: Hypervisor) -> None:
    host.shell("systemctl enable --now vmherd-guests")
    host.reboot()
    told = host.shell("journalctl --no-pager --boot=-1 --unit=vmherd-guests --output=cat")
    assert "inner: stopped" in told
    stopped = "journalctl --no-pager --boot=-1 --output=cat --identifier=systemd | grep '^Stopped vmherd'"
    lines = host.shell(stopped).splitlines()
    order = [max(n for n, line in enumerate(lines) if f"Stopped {unit}.service" in line) for unit in ORDER]
    assert order == sorted(order)
    host.vmherd(f"wait inner --until agent --timeout {LAUNCH_TIMEOUT_S:g}")
