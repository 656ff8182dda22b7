"""Puts the built-in guest together and keeps it: once for a host, in a cache, and a copy in each images directory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vmherd.image.builtin import initramfs, kernel, packages
from vmherd.image.builtin.cpio import archive
from vmherd.image.errors import BuildFailed, ImageCorrupt
from vmherd.image.registry import DESCRIPTION, KernelImage, read_description, read_image

NAME = "builtin"
RECIPE_VERSION = 1
DEFAULT_CPUS = 1
DEFAULT_MEMORY_MIB = 128
COMMAND_LINE = "console=ttyS0 quiet cryptomgr.notests"
"""`cryptomgr.notests`: the kernel tests its ciphers at each boot, which takes 0.25 s under emulation."""

# Which package always has the distribution's newest kernel for virtual machines. Debian 12 is the one that is tested.
KERNEL_PACKAGES: Mapping[str, str] = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
# Everything else that these depend on serves to install them.
KEEP = re.compile(r"linux-(image|modules)-\d.*|busybox-static|qemu-guest-agent|lib.*|zlib1g")

LOCK_TIMEOUT_S = 900.0
LOCK_RETRY_S = 0.05


def build_builtin(images_dir: Path, *, cache_dir: Path | None = None, fresh: bool = False) -> KernelImage:
    """The built-in guest in an images directory; made if it is not there or not of this recipe and host release.

    `fresh` makes it anew in any case, from the newest packages. `cache_dir` is the user's own by default.

    Raises:
        BuildFailed: the host lacks something, or the packages cannot be had.
        OSError: a directory cannot be written.
    """
    cache_dir = (cache_dir or default_cache_dir()).resolve()
    installed, cached = images_dir / NAME, cache_dir / NAME
    fingerprint = _fingerprint()
    if not fresh and _is_current(installed, fingerprint):
        return read_image(installed)
    with ExitStack() as locks:
        for directory in sorted({images_dir.resolve(), cache_dir}):
            locks.enter_context(_only_one(directory))
        if fresh or not _is_current(cached, fingerprint):
            _replace(cached, lambda directory: _build(directory, cache_dir, fingerprint))
        if fresh or not _is_current(installed, fingerprint):
            _replace(installed, lambda directory: shutil.copytree(cached, directory, dirs_exist_ok=True))
    return read_image(installed)


def default_cache_dir() -> Path:
    """Where packages and finished images are kept between builds."""
    if os.geteuid() == 0:
        return Path("/var/cache/vmherd")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmherd"


def _build(directory: Path, cache_dir: Path, fingerprint: str) -> None:
    fetched = packages.fetch((_kernel_package(), "busybox-static", "qemu-guest-agent"), KEEP, cache_dir)
    kernel_package = next(package for package in fetched if package.name.startswith("linux-image-"))
    release = kernel_package.name.removeprefix("linux-image-")
    version = f"{RECIPE_VERSION}-{kernel_package.version}"
    root = directory.parent / "unpacked"
    root.mkdir()
    packages.unpack(fetched, root)
    (directory / "kernel").write_bytes(kernel.vmlinux((root / f"boot/vmlinuz-{release}").read_bytes()))
    # Not compressed: the guest would spend more time on it than the host on reading it.
    (directory / "initramfs").write_bytes(archive(initramfs.tree(root, release, version)))
    description = {
        "version": version,
        "command_line": COMMAND_LINE,
        "default_cpus": DEFAULT_CPUS,
        "default_memory_mib": DEFAULT_MEMORY_MIB,
        "fingerprint": fingerprint,
        "packages": {package.name: package.version for package in fetched},
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def _kernel_package() -> str:
    if platform.machine() != "x86_64":
        raise BuildFailed(f"the built-in guest is made for x86_64 hosts, this one is {platform.machine()}")
    release = _os_release()
    for distribution in (release.get("ID", ""), *release.get("ID_LIKE", "").split()):
        if distribution in KERNEL_PACKAGES:
            return KERNEL_PACKAGES[distribution]
    raise BuildFailed(f"the built-in guest needs a Debian or Ubuntu host, this one is {release.get('ID', 'unknown')!r}")


def _os_release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _fingerprint() -> str:
    """Changes with the recipe, which is this package's own files, and with the host's release."""
    release = _os_release()
    digest = hashlib.sha256(f"{release.get('ID')} {release.get('VERSION_ID')}\n".encode())
    here = Path(__file__).parent
    for path in sorted(path for path in here.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(here)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _is_current(directory: Path, fingerprint: str) -> bool:
    try:
        read_image(directory)
        return bool(read_description(directory).get("fingerprint") == fingerprint)
    except ImageCorrupt:
        return False


def _replace(target: Path, fill: Callable[[Path], object]) -> None:
    """Puts a directory in place that is complete, or changes nothing."""
    for left_over in target.parent.glob(f".{target.name}-*"):  # of a build that was killed
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        fill(new)
        new.chmod(0o755)  # QEMU reads it under another uid
        for path in new.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():  # a directory cannot take a full one's place in one step
            target.rename(old)
        new.rename(target)


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Lets one process at a time work in a directory, for as long as it lives."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildFailed(f"another build has been at work in {directory} for too long") from None
                time.sleep(LOCK_RETRY_S)
        yield
    finally:
        os.close(descriptor)
