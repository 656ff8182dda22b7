"""What `make setup` installs, and that it says so where it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [line for line in (ROOT / "packaging/debian-packages").read_text().splitlines() if not line.startswith("#")]
SCRIPT = "install-debian-packages"
NOBODY = 65534
TIMEOUT_S = 30.0


@pytest.fixture
def host() -> Iterator[Path]:
    """A directory of programs that only write down how they were called; all packages are installed but QEMU."""
    with tempfile.TemporaryDirectory(prefix="vmherd-host-") as directory:  # other users must get into it
        Path(directory).chmod(0o755)
        yield _filled(Path(directory))


def _filled(host: Path) -> Path:
    calls = host / "calls"
    calls.touch()
    calls.chmod(0o666)
    installed = "".join(f"echo 'ii {name}'\n" for name in PACKAGES if name != "qemu-system-x86")
    programs = {
        "dpkg-query": f"{installed}exit 1\n",
        "apt-get": f'echo "apt-get $*" >>{calls}\n',
    }
    for name in (SCRIPT, "debian-packages"):  # the checkout may lie where other users cannot look
        shutil.copy(ROOT / "packaging" / name, host)
    for name, body in programs.items():
        (host / name).write_text(f"#!/bin/sh\n{body}")
        (host / name).chmod(0o755)
    return host


def install(host: Path, *, user: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [host / SCRIPT],
        env={"PATH": f"{host}:{os.defpath}"},
        user=user,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_root_installs_only_what_is_missing(host: Path) -> None:
    done = install(host)
    assert done.returncode == 0, done.stderr
    update, installed = (host / "calls").read_text().splitlines()
    assert update.startswith("apt-get update")
    assert installed.startswith("apt-get install")
    assert "--no-install-recommends" in installed
    assert installed.split()[-1] == "qemu-system-x86"
    assert not set(installed.split()) & set(PACKAGES) - {"qemu-system-x86"}


def test_an_ordinary_user_is_told_what_to_install(host: Path) -> None:
    (host / "sudo").write_text("#!/bin/sh\nexit 1\n")  # one that asks for a password
    (host / "sudo").chmod(0o755)
    done = install(host, user=NOBODY if os.getuid() == 0 else None)
    assert done.returncode == 1
    assert "apt-get install --no-install-recommends qemu-system-x86\n" in done.stderr
    assert (host / "calls").read_text() == ""


def test_sudo_without_a_password_is_used(host: Path) -> None:
    (host / "sudo").write_text('#!/bin/sh\nshift\nexec "$@"\n')  # sudo --non-interactive …
    (host / "sudo").chmod(0o755)
    done = install(host, user=NOBODY if os.getuid() == 0 else None)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in (host / "calls").read_text().splitlines()] == ["update", "install"]


def test_nothing_missing_is_nothing_done(host: Path) -> None:
    (host / "dpkg-query").write_text("#!/bin/sh\n" + "".join(f"echo 'ii {name}'\n" for name in PACKAGES))
    done = install(host)
    assert (done.returncode, done.stderr, (host / "calls").read_text()) == (0, "", "")


def test_the_host_gets_no_kernel() -> None:
    assert not [name for name in PACKAGES if name.startswith("linux-")]


def test_every_python_package_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==[A-Za-z0-9.]+", line) for line in lines]
    assert all(pins), "a pin is NAME==VERSION"
    pinned = {_normal(pin[1]) for pin in pins if pin}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(name for names in project["project"]["optional-dependencies"].values() for name in names),
    ]
    assert {_normal(re.split(r"[\s<>=!~\[;]", name)[0]) for name in wanted} <= pinned


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "--directory", ROOT], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    for target in ("setup", "demo", "run", "test", "test-systemd", "deb", "install", "lint", "bench", "clean"):
        assert f"  make {target} " in done.stdout


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
