"""The package in a full Debian guest.

One guest serves all of these tests. They tell one story, so each builds on those before it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.debian_guest import HYPERVISOR, debian_guest, debian_herd
from tests.systemd.hypervisor import Hypervisor

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 600.0


@pytest.fixture(scope="session")
def package() -> Path:
    """The Debian package, made now."""
    built = subprocess.run(
        [ROOT / "packaging/deb/build"], stdout=subprocess.PIPE, text=True, timeout=BUILD_TIMEOUT_S, check=True
    )
    return ROOT / built.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def host() -> Iterator[Hypervisor]:
    """The guest, running."""
    with debian_herd(debian_guest(HYPERVISOR)) as herd:
        yield Hypervisor(herd)
