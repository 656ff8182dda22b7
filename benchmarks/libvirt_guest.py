"""A guest under libvirt, pinged through python-libvirt: run by Debian's own Python, in mounts of its own, as root.

Every line on standard input asks for one ping, and every line on standard output is its time in seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from xml.sax.saxutils import escape

import libvirt  # type: ignore[import-not-found]
import libvirt_qemu  # type: ignore[import-not-found]

T = TypeVar("T")

OWN = ("/etc/libvirt", "/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
"""
READY_TIMEOUT_S = 120.0
POLL_INTERVAL_S = 0.1

DOMAIN = """
<domain type="qemu">
  <name>bench</name>
  <memory unit="MiB">{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
    <controller type="virtio-serial"/>
    <channel type="unix">
      <source mode="bind"/>
      <target type="virtio" name="org.qemu.guest_agent.0"/>
    </channel>
    <memballoon model="none"/>
  </devices>
</domain>
"""


def main(kernel: str, initramfs: str, command_line: str, memory_mib: str) -> None:
    """Starts libvirt and the guest, answers until standard input ends, and ends both."""
    _hide_the_host()
    daemon = subprocess.Popen(["/usr/sbin/libvirtd"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        connection = _connected()
        values = {"kernel": kernel, "initramfs": initramfs, "command_line": command_line, "memory_mib": memory_mib}
        domain = connection.createXML(DOMAIN.format_map({key: escape(value) for key, value in values.items()}))
        try:
            _until(lambda: _ping(domain))
            for _ in sys.stdin:
                start_s = time.perf_counter()
                _ping(domain)
                print(time.perf_counter() - start_s, flush=True)
        finally:
            domain.destroy()
            connection.close()
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()


def _hide_the_host() -> None:
    """Gives libvirt empty directories, and no KVM: with a bad one it tries for minutes."""
    for path in filter(os.path.isdir, OWN):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    if os.path.exists("/dev/kvm"):
        subprocess.run(["mount", "--bind", "/dev/null", "/dev/kvm"], check=True)
    Path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF)


def _connected() -> libvirt.virConnect:
    libvirt.registerErrorHandler(lambda *_: None, None)
    return _until(lambda: libvirt.open("qemu:///system"))


def _ping(domain: libvirt.virDomain) -> str:
    answer: str = libvirt_qemu.qemuAgentCommand(domain, '{"execute":"guest-ping"}', 10, 0)
    return answer


def _until(attempt: Callable[[], T]) -> T:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            return attempt()
        except libvirt.libvirtError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(POLL_INTERVAL_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
