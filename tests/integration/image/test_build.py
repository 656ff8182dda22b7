"""The whole build, on a host that has never fetched a package list, without rights and without a network.

Its packages come from a repository in a directory, made of those that the other tests' image was built from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.framework import newc
from vmherd.image.builtin import default_cache_dir
from vmherd.image.builtin.build import KERNEL_PACKAGES
from vmherd.image.registry import KernelImage

BUILD_TIMEOUT_S = 250.0
# Root without any capability may do no more than an ordinary user who owns the same files.
SETPRIV = (shutil.which("setpriv") or "setpriv", "--bounding-set=-all", "--inh-caps=-all")
WITHOUT_RIGHTS = SETPRIV if os.geteuid() == 0 else ()

APT_CONF = """\
Dir::Etc::SourceList "{host}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State "{host}/state";
APT::Sandbox::User "root";
"""


@pytest.fixture(scope="module")
def host(builtin_image: KernelImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a repository, and an `apt.conf` for a host that knows no other."""
    host = tmp_path_factory.mktemp("host")
    shutil.copytree(default_cache_dir() / "packages", host / "repository")
    write_index(host / "repository")
    (host / "sources.list").write_text(f"deb [trusted=yes] file:{host}/repository ./\n")
    (host / "state/lists/partial").mkdir(parents=True)
    (host / "apt.conf").write_text(APT_CONF.format(host=host))
    return host


def write_index(repository: Path) -> None:
    """https://wiki.debian.org/DebianRepository/Format#A.22Packages.22_Indices"""
    records = []
    for package in sorted(repository.glob("*.deb")):
        control = subprocess.run(["dpkg-deb", "-f", package], capture_output=True, text=True, check=True, timeout=60)
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
        place = f"Filename: ./{package.name}\nSize: {package.stat().st_size}\nSHA256: {digest}\n"
        records.append(control.stdout + place)
        if package.name.startswith("linux-image-"):
            # The packages that always depend on the newest kernel are not fetched themselves.
            name, version, _ = package.name.split("_")
            records += [
                f"Package: {newest}\nVersion: {version}\nArchitecture: amd64\nDepends: {name}\n{place}"
                for newest in KERNEL_PACKAGES.values()
            ]
    (repository / "Packages").write_text("\n".join(records))


def build(host: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WITHOUT_RIGHTS, sys.executable, "-m", "vmherd.image.builtin", "--images-dir", host / "images", *options],
        env={**os.environ, "APT_CONFIG": str(host / "apt.conf"), **environment},
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def built(host: Path) -> Path:
    process = build(host, f"--cache-dir={host}/cache")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("built-in guest 1-")
    return host / "images" / "builtin"


def identity(path: Path) -> tuple[int, int]:
    """What another one in its place would not have; that it was read counts for nothing."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def test_two_builds_give_the_same_bytes(built: Path, builtin_image: KernelImage) -> None:
    for file in ("kernel", "initramfs", "image.json"):
        assert (built / file).read_bytes() == (builtin_image.kernel.parent / file).read_bytes()


def test_nothing_but_the_image_is_left_in_the_images_directory(built: Path) -> None:
    assert [path.name for path in built.parent.iterdir()] == ["builtin"]
    assert sorted(path.name for path in built.iterdir()) == ["image.json", "initramfs", "kernel"]


def test_the_second_call_needs_neither_tools_nor_a_cache(built: Path, host: Path) -> None:
    before = identity(built)
    process = build(host, f"--cache-dir={host}/no-cache", PATH="")
    assert process.returncode == 0, process.stderr
    assert not (host / "no-cache").exists()
    assert identity(built) == before


def test_without_apt_it_says_which_hosts_it_needs_and_the_old_image_stays(built: Path, host: Path) -> None:
    before = identity(built)
    process = build(host, f"--cache-dir={host}/another-cache", "--fresh", PATH="")
    assert (process.returncode, process.stderr) == (
        1,
        "cannot make the built-in guest: "
        "apt-cache, apt-get, dpkg-deb not found: the built-in guest needs a Debian or Ubuntu host\n",
    )
    assert identity(built) == before


def test_what_apt_complains_of_is_said_and_the_old_image_stays(built: Path, host: Path) -> None:
    (host / "nowhere.list").write_text(f"deb [trusted=yes] file:{host}/nowhere ./\n")
    (host / "nowhere.conf").write_text((host / "apt.conf").read_text().replace("sources.list", "nowhere.list"))
    before = identity(built)
    process = build(host, f"--cache-dir={host}/another-cache", "--fresh", APT_CONFIG=f"{host}/nowhere.conf")
    assert process.returncode == 1
    assert process.stderr.startswith("cannot make the built-in guest: apt-cache failed: E: No packages found\n")
    assert f"E: Failed to fetch file:{host}/nowhere/./Packages  File not found" in process.stderr
    assert "Traceback" not in process.stderr
    assert identity(built) == before


def test_a_directory_that_cannot_be_made_is_named(host: Path) -> None:
    process = build(host, f"--images-dir={host}/apt.conf/images", f"--cache-dir={host}/cache")
    assert process.returncode == 1
    assert process.stderr == (f"cannot make the built-in guest: [Errno 20] Not a directory: '{host}/apt.conf/images'\n")


def test_modprobe_s_list_is_complete(builtin_image: KernelImage) -> None:
    files = newc.read(builtin_image.initramfs.read_bytes())
    (place,) = (name.removesuffix("modules.dep") for name in files if name.endswith("/modules.dep"))
    listed = [line.split() for line in files[f"{place}modules.dep"].content.decode().splitlines()]
    needs = {name.removesuffix(":"): needed for name, *needed in listed}
    assert {f"{place}{name}" for name in needs} == {name for name in files if name.endswith(".ko")}
    assert "virtio_net.ko" in needs
    for needed in needs.values():
        # From right to left, each comes after what it needs itself.
        for position, name in enumerate(needed):
            assert set(needs[name]) <= set(needed[position + 1 :])


def test_busybox_unpacks_it_as_the_kernel_does(builtin_image: KernelImage, tmp_path: Path) -> None:
    archive = builtin_image.initramfs.read_bytes()
    files = newc.read(archive)
    busybox = tmp_path / "busybox"
    busybox.write_bytes(files["usr/bin/busybox"].content)
    busybox.chmod(0o700)
    listing = subprocess.run([busybox, "cpio", "-t"], input=archive, capture_output=True, check=True, timeout=60)
    assert listing.stdout.decode().splitlines() == list(files)
    plain = ("etc/inittab", "usr/bin/qemu-ga", "init")
    (tmp_path / "root").mkdir()
    subprocess.run(
        [busybox, "cpio", "-id", *plain],
        input=archive,
        cwd=tmp_path / "root",
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert (tmp_path / "root/etc/inittab").read_bytes() == files["etc/inittab"].content
    assert (tmp_path / "root/usr/bin/qemu-ga").stat().st_mode == files["usr/bin/qemu-ga"].mode
    assert os.readlink(tmp_path / "root/init") == "usr/bin/busybox"
