"""Whatever happens to the three services, the machine lives on."""

from __future__ import annotations

import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S
from tests.systemd.hypervisor import SERVICES, Hypervisor
from tests.systemd.test_1_installing import PACKAGE

pytestmark = pytest.mark.timeout(2 * TEST_TIMEOUT_S)


@pytest.mark.parametrize("unit", [*SERVICES, "vmherd.target"])
def test_a_restart(host: Hypervisor, unit: str) -> None:
    before = host.life("inner")
    host.shell(f"systemctl restart {unit}")
    assert host.life("inner") == before


@pytest.mark.parametrize("service", SERVICES)
def test_a_kill(host: Hypervisor, service: str) -> None:
    before = host.life("inner")
    main = host.shell(f"systemctl show --value --property=MainPID {service}").strip()
    host.shell(f"kill -KILL {main}")
    _back(host, service, main)
    assert host.life("inner") == before


def test_a_helper_that_hangs_is_replaced_by_the_watchdog(host: Hypervisor) -> None:
    before = host.life("inner")
    main = host.shell("systemctl show --value --property=MainPID vmherd-qemu").strip()
    host.shell(f"kill -STOP {main}")
    _back(host, "vmherd-qemu", main)
    assert "watchdog" in host.shell("journalctl --no-pager --unit=vmherd-qemu --lines=50 --grep=watchdog")
    assert host.life("inner") == before


def test_an_upgrade(host: Hypervisor) -> None:
    before = host.life("inner")
    host.shell("""sed -i '1s/{/{ "log_level": "debug",/' /etc/vmherd/gateway.json""")
    host.shell(f"dpkg --install {PACKAGE}")
    assert host.life("inner") == before
    assert "debug" in host.shell("cat /etc/vmherd/gateway.json")


def _back(host: Hypervisor, service: str, old_main: str) -> None:
    """Waits until another process serves, and everything is well."""

    def replaced() -> bool:
        shown = host.shell(f"systemctl show --value --property=MainPID,ActiveState {service}").split()
        return "active" in shown and old_main not in shown

    host.eventually(replaced)
    assert host.shell("systemctl is-system-running").strip() == "running"
