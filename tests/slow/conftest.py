"""The full Debian guest, for what the built-in one is too small for. One machine serves all of these tests.

The modules run in the order of their names: the last one ends what the others share.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.framework.console import Console
from tests.framework.debian_guest import debian
from tests.framework.herd import HerdUnderTest

__all__ = ["debian"]

SECOND = "/srv/second"


@pytest.fixture
def as_found(debian: HerdUnderTest) -> Iterator[None]:
    """The test leaves the guest running as it was, and thawed."""
    boot_id = debian.boot_id()
    yield
    thawed = debian.ask("POST", "web/guest/fsfreeze-thaw")["thawed"]  # or every later test would fail as well
    assert (thawed, debian.boot_id()) == ("0", boot_id)


@pytest.fixture(scope="module")
def second(debian: HerdUnderTest) -> Iterator[str]:
    """Where a second file system is mounted, which is on a partition of a disk of its own."""
    debian.shell(
        f"""set -e
        truncate --size 32M {SECOND}.img
        echo ',,L' | sfdisk --quiet {SECOND}.img
        losetup --partscan /dev/loop0 {SECOND}.img
        udevadm settle
        mkfs.ext4 -q /dev/loop0p1
        mkdir {SECOND}
        mount /dev/loop0p1 {SECOND}
        chmod 1777 {SECOND}"""
    )
    yield SECOND
    debian.shell(f"umount {SECOND} && losetup --detach /dev/loop0 && rm -r {SECOND} {SECOND}.img")


@pytest.fixture
def console(debian: HerdUnderTest) -> Iterator[Console]:
    """A shell in the guest that does not need its agent."""
    with debian.at_console() as console:
        yield console
