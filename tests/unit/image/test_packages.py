from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmherd.image.builtin.build import KEEP
from vmherd.image.builtin.packages import fetch, follow, run
from vmherd.image.errors import BuildFailed

LISTING = """\
linux-image-cloud-amd64
  Depends: linux-image-6.1.0-56-cloud-amd64
qemu-guest-agent
  PreDepends: init-system-helpers
  Depends: libc6
  Depends: libglib2.0-0
linux-image-6.1.0-56-cloud-amd64
  Depends: kmod
 |Depends: initramfs-tools
  Depends: <linux-initramfs-tool>
    dracut
init-system-helpers
  Depends: perl
libc6
  Depends: libgcc-s1
libglib2.0-0
  Depends: libc6
 |Depends: libffi8
  Depends: <libffi-virtual>
  Depends: zlib1g
libgcc-s1
  Depends: libc6
perl
  Depends: libperl5.36
libperl5.36
libffi8
zlib1g
kmod
initramfs-tools
"""


def test_it_follows_only_what_it_keeps() -> None:
    names = follow(["linux-image-cloud-amd64", "qemu-guest-agent"], LISTING, KEEP)
    assert names == [
        "qemu-guest-agent",
        "linux-image-6.1.0-56-cloud-amd64",
        "libc6",
        "libglib2.0-0",
        "libgcc-s1",
        "libffi8",
        "zlib1g",
    ]


def test_a_package_that_apt_does_not_know_is_named() -> None:
    with pytest.raises(BuildFailed, match="apt knows no package busybox-static"):
        follow(["qemu-guest-agent", "busybox-static"], LISTING, KEEP)


def test_without_apt_it_says_which_hosts_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildFailed) as caught:
        fetch(["busybox-static"], re.compile(".*"), tmp_path)
    assert str(caught.value) == (
        "apt-cache, apt-get, dpkg-deb not found: the built-in guest needs a Debian or Ubuntu host"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_tool_that_fails_is_quoted() -> None:
    with pytest.raises(BuildFailed, match=r"^sh failed: no such thing$"):
        run(["sh", "-c", "echo no such thing >&2; exit 3"], timeout_s=60)
    with pytest.raises(BuildFailed, match=r"^sh failed: it ended with 3$"):
        run(["sh", "-c", "exit 3"], timeout_s=60)


def test_a_tool_that_hangs_is_ended() -> None:
    with pytest.raises(BuildFailed, match=r"^sleep did not end within 0\.1 s$"):
        run(["sleep", "60"], timeout_s=0.1)


def test_a_tool_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=f"^cannot start {tmp_path}: Permission denied$"):
        run([str(tmp_path)], timeout_s=60)
