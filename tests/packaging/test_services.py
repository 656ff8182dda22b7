"""The units, users, directories and settings of an installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmherd.api.settings.v1.settings_pb2 import ControllerSettings, GatewaySettings, QemuSettings
from vmherd.cli.settings import load_settings
from vmherd.client import find_controller
from vmherd.model.errors import Unavailable
from vmherd.qemu.capabilities import CAPABILITIES

PACKAGING = Path(__file__).parents[2] / "packaging"
UNITS = PACKAGING / "systemd"
PROGRAM = "/usr/lib/vmherd/bin/vmherd"
SERVICES = ("qemu", "controller", "gateway")
TIMEOUT_S = 30.0

MAX_EXPOSURE = {"qemu": 32, "controller": 16, "gateway": 13, "guests": 32}
"""Of 100, as systemd 252 counts. packaging/README.md has the reason for each point of the helper's."""

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as folder:
        yield Path(folder)


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def values(unit: str, key: str) -> list[str]:
    """What a unit says of this key, word by word."""
    lines = re.findall(rf"^{key}=(.*)$", (UNITS / unit).read_text(), re.MULTILINE)
    return [word for line in lines for word in line.split()]


@needs_systemd
def test_systemd_understands_the_units(folder: Path) -> None:
    units = [path for path in sorted(UNITS.glob("vmherd*")) if path.suffix in (".service", ".target", ".slice")]
    for path in units:
        (folder / path.name).write_text(re.sub(r"/(usr/lib|opt)/vmherd/bin/vmherd", sys.executable, path.read_text()))
    done = run("systemd-analyze", "verify", *(folder / path.name for path in units))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("name", MAX_EXPOSURE)
def test_a_service_is_confined(name: str) -> None:
    threshold = f"--threshold={MAX_EXPOSURE[name]}"
    done = run("systemd-analyze", "security", "--offline=true", threshold, UNITS / f"vmherd-{name}.service")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_says_when_it_is_ready_and_whether_it_lives(name: str) -> None:
    unit = f"vmherd-{name}.service"
    assert values(unit, "Type") == ["notify"]
    assert values(unit, "NotifyAccess") == ["main"]
    assert values(unit, "WatchdogSec")
    assert values(unit, "Restart") == ["on-failure"]
    assert values(unit, "ExecStart") == [PROGRAM, name, "--settings", f"/etc/vmherd/{name}.json"]


def test_the_helper_may_do_what_it_keeps_and_no_more() -> None:
    kept = sorted(f"CAP_{reason.partition(':')[0]}" for reason in CAPABILITIES.values())
    assert sorted(values("vmherd-qemu.service", "CapabilityBoundingSet")) == kept


def test_no_service_ends_with_another() -> None:
    for name in SERVICES:
        for key in ("Requires", "BindsTo", "Requisite"):
            assert values(f"vmherd-{name}.service", key) == []


@pytest.mark.parametrize(
    ("name", "kind"), [("qemu", QemuSettings), ("controller", ControllerSettings), ("gateway", GatewaySettings)]
)
def test_the_settings_are_settings(name: str, kind: type) -> None:
    load_settings(PACKAGING / "settings" / f"{name}.json", kind)


def test_the_settings_fit_each_other_and_the_units() -> None:
    qemu = load_settings(PACKAGING / "settings/qemu.json", QemuSettings)
    controller = load_settings(PACKAGING / "settings/controller.json", ControllerSettings)
    gateway = load_settings(PACKAGING / "settings/gateway.json", GatewaySettings)
    assert (controller.qemu, controller.run_dir, controller.state_dir) == (qemu.listen, qemu.run_dir, qemu.state_dir)
    assert (gateway.controller, gateway.token_file) == (controller.listen, controller.token_file)
    assert [qemu.controller_user] == values("vmherd-controller.service", "User")
    assert [controller.socket_group] == values("vmherd-controller.service", "SupplementaryGroups")
    assert [controller.socket_group] == values("vmherd-gateway.service", "SupplementaryGroups")
    assert {qemu.run_dir, qemu.state_dir} < set(values("vmherd-qemu.service", "ReadWritePaths"))
    assert values("vmherd-controller.service", "RuntimeDirectory") == [Path(controller.listen).parent.name]


@pytest.mark.parametrize("uid", [0, 1000])
def test_everybody_finds_the_controller(uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = load_settings(PACKAGING / "settings/controller.json", ControllerSettings).listen
    looked_at: list[str] = []
    monkeypatch.setattr("os.path.exists", lambda path: looked_at.append(str(path)))
    with pytest.raises(Unavailable):
        find_controller(environ={"HOME": "/home/alice"}, uid=uid)
    assert looked_at[0] == socket


@needs_root
@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="needs systemd-sysusers")
def test_users_and_directories(folder: Path) -> None:
    for program, configuration in (("sysusers", "sysusers"), ("tmpfiles", "tmpfiles")):
        (folder / f"usr/lib/{program}.d").mkdir(parents=True)
        shutil.copy(UNITS / f"vmherd.{configuration}", folder / f"usr/lib/{program}.d/vmherd.conf")
    (folder / "etc").mkdir()
    made = run("systemd-sysusers", f"--root={folder}")
    assert made.returncode == 0, made.stderr
    users = {line.split(":")[0]: line.split(":") for line in (folder / "etc/passwd").read_text().splitlines()}
    groups = {line.split(":")[0]: line.split(":") for line in (folder / "etc/group").read_text().splitlines()}
    assert {"vmherd", "vmherd-gateway"} <= users.keys()
    assert {"vmherd", "vmherd-gateway", "vmherd-clients"} <= groups.keys()
    assert all(users[name][-1].endswith("/nologin") for name in ("vmherd", "vmherd-gateway"))
    assert groups["vmherd"][3] == ""
    made = run("systemd-tmpfiles", f"--root={folder}", "--create")
    assert made.returncode == 0, made.stderr
    vmherd, its_group = int(users["vmherd"][2]), int(groups["vmherd"][2])
    wanted = {
        "run/vmherd-qemu": (0, its_group, 0o751),
        "var/lib/vmherd": (vmherd, its_group, 0o750),
        "var/lib/vmherd/images": (vmherd, its_group, 0o750),
    }
    found = {name: (folder / name).stat() for name in wanted}
    assert {name: (it.st_uid, it.st_gid, it.st_mode & 0o7777) for name, it in found.items()} == wanted


@pytest.mark.parametrize("script", ["set-up", "tear-down", "deb/postinst", "deb/prerm", "deb/postrm"])
def test_a_script_is_one_for_any_shell(script: str) -> None:
    path = PACKAGING / script
    assert path.read_text().startswith("#!/bin/sh\n")
    assert os.access(path, os.X_OK)
    done = run("/bin/sh", "-n", path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_build_fills_in_all_of_the_control_file() -> None:
    fields = re.findall(r"@[A-Z_]+@", (PACKAGING / "deb/control").read_text())
    assert sorted(set(fields)) == sorted(set(re.findall(r"@[A-Z_]+@", (PACKAGING / "deb/build").read_text())))
