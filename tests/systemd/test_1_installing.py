"""The package is installed, and everything runs as it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.framework.debian_guest import TEST_TIMEOUT_S, USER
from tests.systemd.hypervisor import LAUNCH_TIMEOUT_S, SERVICES, Hypervisor

pytestmark = pytest.mark.timeout(3 * TEST_TIMEOUT_S)

PACKAGE = "/root/vmherd.deb"

OWNERS = """\
drwxr-xr-x root:root /etc/vmherd
-rw-r--r-- root:root /etc/vmherd/controller.json
-rw-r--r-- root:root /etc/vmherd/gateway.json
-rw-r--r-- root:root /etc/vmherd/qemu.json
-rw-r----- root:vmherd-clients /etc/vmherd/token
drwxr-xr-x vmherd:vmherd /run/vmherd
srw-rw---- vmherd:vmherd-clients /run/vmherd/controller.sock
drwxr-x--x root:vmherd /run/vmherd-qemu
srw-rw---- root:vmherd /run/vmherd-qemu/qemu.sock
drwxr-x--- vmherd:vmherd /var/lib/vmherd
drwxr-x--- vmherd:vmherd /var/lib/vmherd/images
drwxr-xr-x vmherd:vmherd /var/lib/vmherd/images/builtin
-rw-r--r-- vmherd:vmherd /var/lib/vmherd/images/builtin/kernel
"""


def test_it_installs_and_starts(host: Hypervisor, package: Path) -> None:
    host.shell("mkdir --parents /var/log/journal && systemctl restart systemd-journald")  # outlives a reboot
    host.copy_in(package, PACKAGE)
    host.shell(f"dpkg --install {PACKAGE}")
    units = " ".join(("vmherd.target", *SERVICES))
    assert set(host.shell(f"systemctl is-active {units}").split()) == {"active"}
    assert set(host.shell(f"systemctl is-enabled {units}").split()) == {"enabled"}
    assert host.shell("systemctl is-system-running").strip() == "running"
    # Ready is what they say of themselves, and nobody had to be started twice for it.
    for service in SERVICES:
        shown = host.shell(f"systemctl show --property=Type,StatusText,NRestarts {service}")
        assert {"Type=notify", "NRestarts=0"} <= set(shown.split("\n"))


def test_owners_and_modes(host: Hypervisor) -> None:
    paths = " ".join(line.split()[-1] for line in OWNERS.splitlines())
    assert host.shell(f"stat --format='%A %U:%G %n' {paths}") == OWNERS


def test_members_of_the_group_need_no_sudo(host: Hypervisor) -> None:
    code, said = host.outcome("vmherd list", user=USER)
    assert code != 0
    assert "vmherd-clients" in said
    host.shell(f"usermod --append --groups vmherd-clients {USER}")
    assert host.vmherd("list") == ""
    assert host.ask("GET", "")["instances"] == []  # with the token, which they may read


def test_a_machine_launches(host: Hypervisor) -> None:
    host.vmherd(f"launch inner --autostart --timeout {LAUNCH_TIMEOUT_S:g}")
    assert "Linux" in host.vmherd("exec inner -- uname -a")
    assert host.instance("inner")["state"] == "RUNNING"


def test_its_process_is_confined(host: Hypervisor) -> None:
    pid = host.qemu_pid("inner")
    status = dict(line.split(":\t", 1) for line in host.shell(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    [uid] = set(status["Uid"].split())
    assert 1_900_000_000 <= int(uid) < 1_900_065_536
    assert set(status["Gid"].split()) == {uid}
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16)) == (0, 0)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_its_limits(host: Hypervisor) -> None:
    pid = host.qemu_pid("inner")
    [line] = host.shell(f"cat /proc/{pid}/cgroup").splitlines()
    cgroup = line.removeprefix("0::")
    assert cgroup.startswith("/vmherd.slice/vmherd-machines.slice/")
    assert cgroup.endswith(".scope")
    limits = host.shell(f"cd /sys/fs/cgroup{cgroup} && cat memory.max cpu.max pids.max").split()
    memory_mib = host.instance("inner")["hardware"]["memoryMib"]
    assert int(limits[0]) >= memory_mib << 20
    assert "max" not in (limits[1], limits[3])


def test_the_journal_knows_the_machine(host: Hypervisor) -> None:
    uid = host.uid("inner")
    for field in ("VMHERD_NAME=inner", f"VMHERD_UID={uid}"):
        assert "started" in host.shell(f"journalctl --no-pager --output=short --unit=vmherd-qemu {field}")
