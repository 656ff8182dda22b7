"""libvirt as a peer, where it is installed: the same kernel, ping by ping, through python-libvirt."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from vmherd.image.registry import KernelImage

PYTHON = "/usr/bin/python3"
"""Debian's own, which has the binding of Debian's libvirt."""

GUEST = Path(__file__).with_name("libvirt_guest.py")


def missing() -> str:
    """Why libvirt cannot be measured here, empty where it can."""
    if os.getuid() != 0:
        return "it takes root"
    binding = [PYTHON, "-c", "import libvirt_qemu"]
    if not shutil.which("libvirtd") or subprocess.run(binding, stderr=subprocess.DEVNULL, check=False).returncode:
        return "it takes the packages libvirt-daemon-system and python3-libvirt"
    return ""


@contextlib.contextmanager
def pings(image: KernelImage, memory_mib: int) -> Iterator[Callable[[], float]]:
    """A guest of an image; gives what pings its agent and says in how many seconds."""
    boot = [str(image.kernel), str(image.initramfs), image.command_line]
    with subprocess.Popen(
        ["unshare", "--mount", PYTHON, GUEST, *boot, str(memory_mib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        if not stdin or not stdout:
            raise RuntimeError("both are pipes")

        def ping() -> float:
            stdin.write("\n")
            stdin.flush()
            return float(stdout.readline())

        ping()  # it waits for libvirt and for the guest
        yield ping
        stdin.close()
