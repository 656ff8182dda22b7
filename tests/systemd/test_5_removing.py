"""The package goes: first without its data, then with it."""

from __future__ import annotations

import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S
from tests.systemd.hypervisor import Hypervisor
from tests.systemd.test_1_installing import PACKAGE

pytestmark = pytest.mark.timeout(2 * TEST_TIMEOUT_S)


def test_remove_keeps_what_is_the_administrators(host: Hypervisor) -> None:
    uid = host.uid("inner")
    said = host.shell("dpkg --remove vmherd")
    assert "stopping the machines" in said
    assert "inner: stopped" in said
    assert nothing_runs(host)
    assert uid in host.shell("ls /var/lib/vmherd/instances")
    host.shell("test -s /var/lib/vmherd/store.sqlite -a -s /etc/vmherd/token -a -s /etc/vmherd/qemu.json")


def test_it_can_come_back(host: Hypervisor) -> None:
    host.shell(f"dpkg --install {PACKAGE}")
    assert host.instance("inner")["state"] == "STOPPED"


def test_purge_leaves_nothing(host: Hypervisor) -> None:
    host.shell("dpkg --purge vmherd")
    assert nothing_runs(host)
    # The guest's own initramfs has files of that name.
    elsewhere = " ".join(f"! -path '{path}'" for path in ("/tmp/*", "/root/*", "/var/log/*", "*/initramfs-tools/*"))
    assert host.shell(f"find / -xdev -iname '*vmherd*' {elsewhere}") == ""
    assert host.shell("find /run /sys/fs/cgroup -iname '*vmherd*'") == ""
    assert host.outcome("getent passwd | grep vmherd; getent group | grep vmherd")[1] == ""
    assert host.shell("systemctl is-system-running").strip() == "running"


def nothing_runs(host: Hypervisor) -> bool:
    """No process, unit, interface or rule is left."""
    host.eventually(lambda: host.outcome("pgrep --list-full --full '[q]emu-system|[d]nsmasq'")[1] == "", 30)
    return (
        host.shell("systemctl list-units --plain --no-legend 'vmherd*'") == ""
        and "vm" not in host.shell("ip -brief link | cut -d' ' -f1")
        and "vmherd" not in host.shell("nft list tables")
    )
