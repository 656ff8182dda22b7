"""A full Debian guest: systemd, an SSH server, the guest agent, and a user who is logged in on the serial console.

`mmdebstrap` makes it from the packages of the host's own release and apt sources, in about a minute. An ordinary user
needs subordinate uids for that, see subuid(5). It is kept in the user's cache until this file or the release changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.framework.herd import HerdUnderTest, herd_under_test
from vmherd.image.builtin import default_cache_dir
from vmherd.image.registry import DESCRIPTION, KernelImage, read_image

USER = "alice"
"""The user who is logged in on the serial console."""

BOOT_TIMEOUT_S = 300.0
"""The agent answers after some 25 s under emulation; on a busy machine it may take much longer."""

TEST_TIMEOUT_S = 900.0
"""For a test of the guest: the first one may have to wait for its build and its boot."""

_BUILD_TIMEOUT_S = 600.0
_TOOL_TIMEOUT_S = 60.0
_CPUS = 2
_COMMAND_LINE = "console=ttyS0 root=/dev/vda rw quiet cryptomgr.notests"
_PACKAGES = (
    "dbus",
    "fdisk",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "linux-image-cloud-amd64",
    "openssh-server",
    "qemu-guest-agent",
    "systemd-sysv",
    "tzdata",
    "udev",
    "zstd",
)
_FILES: Mapping[str, str] = {
    # The initramfs has no more than it takes to mount the disk: the guest is slow to unpack it.
    "etc/initramfs-tools/conf.d/vmherd": "MODULES=list\n",
    "usr/share/initramfs-tools/modules.d/vmherd": "virtio_pci\nvirtio_blk\n",
    # Not by their type: bridges and TAP devices that are made in the guest are somebody else's.
    "etc/systemd/network/all.network": "[Match]\nName=en*\n\n[Network]\nDHCP=yes\n",
    "etc/systemd/system/serial-getty@ttyS0.service.d/login.conf": (
        f"[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin {USER} ttyS0 linux\n"
    ),
}
_EXCLUDED = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*")


@dataclass(frozen=True)
class Recipe:
    """What tells one Debian guest from another."""

    name: str
    packages: tuple[str, ...]
    disk_size: str
    memory_mib: int


DEBIAN = Recipe("debian", packages=(), disk_size="1G", memory_mib=1024)

HYPERVISOR = Recipe(
    "hypervisor",
    packages=("curl", "dnsmasq-base", "nftables", "procps", "python3", "qemu-system-x86"),
    disk_size="4G",
    memory_mib=3072,
)
"""A guest in which vmherd's own package can be installed and run."""


@dataclass(frozen=True)
class DebianGuest:
    """The guest's image, and the root file system that an instance of it needs on its disk."""

    image: KernelImage
    disk: Path


def debian_guest(recipe: Recipe = DEBIAN) -> DebianGuest:
    """The guest, from the cache or made now."""
    cache_dir, name = default_cache_dir(), recipe.name
    directory = cache_dir / f"{name}-{_fingerprint()}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            for outdated in cache_dir.glob(f"{name}-*"):
                shutil.rmtree(outdated)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_dir) as scratch:
                new = Path(scratch) / name
                _build(recipe, new)
                new.rename(directory)
    return DebianGuest(read_image(directory / name), directory / "disk")


@contextlib.contextmanager
def debian_herd(guest: DebianGuest) -> Iterator[HerdUnderTest]:
    """A herd with one instance of the guest, named `web`, whose agent answers."""
    with herd_under_test(guest.image) as herd:
        instance = herd.launch(image=guest.image.name, start=False, until="")
        copy_sparsely(guest.disk, herd.state.instance(instance["uid"]).disk)
        herd.ask("POST", "web/start")
        herd.wait(timeout_s=BOOT_TIMEOUT_S)
        herd.run("systemctl", "is-system-running", "--wait", timeout=f"{BOOT_TIMEOUT_S:g}s")
        yield herd


@pytest.fixture(scope="session")
def debian() -> Iterator[HerdUnderTest]:
    """A running guest named `web` that all tests share, and leave as they found it."""
    with debian_herd(debian_guest()) as herd:
        yield herd


def copy_sparsely(source: Path, target: Path) -> None:
    """Copies a disk without filling its holes."""
    subprocess.run(["cp", "--sparse=always", "--", source, target], check=True, timeout=_TOOL_TIMEOUT_S)


def _release() -> str:
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def _fingerprint() -> str:
    return hashlib.sha256(_release().encode() + Path(__file__).read_bytes()).hexdigest()[:16]


def _build(recipe: Recipe, directory: Path) -> None:
    image, made = directory / recipe.name, directory / "made"
    image.mkdir(parents=True)
    for name, content in ({"etc/hostname": f"{recipe.name}\n"} | _FILES).items():
        path = made / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    subprocess.run(_mmdebstrap(recipe, made), input=_sources(), text=True, check=True, timeout=_BUILD_TIMEOUT_S)
    # Not unpacked as the built-in guest's is: QEMU would write an ELF kernel into memory once more on waking the guest.
    shutil.copy(made / "vmlinuz", image / "kernel")
    shutil.copy(made / "initrd.img", image / "initramfs")
    copy_sparsely(made / "disk", directory / "disk")
    description = {
        "version": "1",
        "command_line": _COMMAND_LINE,
        "default_cpus": _CPUS,
        "default_memory_mib": recipe.memory_mib,
    }
    (image / DESCRIPTION).write_text(json.dumps(description))
    shutil.rmtree(made)


def _sources() -> str:
    """The host's own apt sources, less those of others than Debian: their packages have no place in the guest."""
    line = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    words = ["apt-get", "indextargets", "--format", line, "Created-By: Packages", "Origin: Debian"]
    sources = subprocess.run(words, check=True, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S).stdout
    assert sources, "apt has no lists of Debian's packages: is this a Debian host, and has `apt-get update` run?"
    return sources


def _mmdebstrap(recipe: Recipe, made: Path) -> list[str]:
    files = " ".join(str(path) for path in sorted((made / "files").iterdir()))
    # What keeps packages from starting anything while mmdebstrap works is not the guest's.
    start_services = "rm /mnt/usr/sbin/policy-rc.d && mv /mnt/sbin/start-stop-daemon.REAL /mnt/sbin/start-stop-daemon"
    # Other file systems are mounted below the root, which a bind mount leaves out; the one on /dev/shm holds the disk.
    make_disk = f'mke2fs -q -t ext4 -d /mnt "$1/dev/shm/disk" {recipe.disk_size}'
    customize = [
        f'chroot "$1" useradd --create-home --shell /bin/bash {USER}',
        'chroot "$1" systemctl --quiet enable systemd-networkd',
        'rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*',
        f'unshare --mount sh -c \'mount --bind "$1" /mnt && {start_services} && {make_disk}\' sh "$1"',
        f"download /vmlinuz {made}/vmlinuz",
        f"download /initrd.img {made}/initrd.img",
        f"download /dev/shm/disk {made}/disk",
    ]
    return [
        *("mmdebstrap", "--quiet", "--variant=minbase", "--format=null"),
        f"--include={','.join((*_PACKAGES, *recipe.packages))}",
        "--aptopt=APT::Install-Recommends false",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED),
        f"--setup-hook=copy-in {files} /",
        *(f"--customize-hook={command}" for command in customize),
        *(_release(), "/dev/null", "-"),
    ]
