"""What comes before QEMU's own words, and what it inherits."""

from __future__ import annotations

import os
import resource
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmherd.model.machine import KernelBoot, Machine
from vmherd.qemu import launch

UID = "6b1f3b0e-5f0c-4b54-9d3c-0123456789ab"
MACHINE = Machine(UID, "web", 3, 2, 512, KernelBoot("/kernel", "", ""))
LIMITS = ("prlimit", "--core=0", "--nofile=4096", "--nproc=258", "--")
USER = (
    *("setpriv", "--reuid=1900000002", "--regid=1900000002", "--clear-groups"),
    *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"),
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host without systemd and KVM, where the helper has no limits."""
    monkeypatch.setattr(launch, "SYSTEMD", tmp_path / "systemd")
    monkeypatch.setattr(launch, "KVM_DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (1024, resource.RLIM_INFINITY))
    return tmp_path


def test_qemu_becomes_a_user_without_rights_and_with_limits() -> None:
    assert launch.chain(MACHINE, 1900000002, "tcg") == (*LIMITS, *USER)


def test_a_limit_is_not_above_the_helper_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (100, 200))
    assert launch.chain(MACHINE, 1900000002, "tcg")[2:4] == ("--nofile=200", "--nproc=200")


def test_under_systemd_a_machine_has_a_scope_of_its_own(host: Path) -> None:
    (host / "systemd").mkdir()
    assert launch.chain(MACHINE, 1900000002, "tcg") == (
        *("systemd-run", "--scope", "--quiet", "--collect", "--slice=vmherd-machines.slice"),
        *(f"--unit=vmherd-{UID}-3", "--description=vmherd: web"),
        *("--property=MemoryMax=1536M", "--property=CPUQuota=300%", "--property=TasksMax=258"),
        *("--property=Before=vmherd-qemu.service vmherd-guests.service", "--"),
        *LIMITS,
        *USER,
    )


@pytest.mark.parametrize(
    ("mode", "gid", "groups"),
    [
        (0o660, 107, "--groups=107"),
        (0o666, 107, "--clear-groups"),
        (0o600, 107, "--clear-groups"),
        (0o660, 0, "--clear-groups"),
    ],
)
def test_kvm_s_group_is_the_only_one_and_never_root_s(
    monkeypatch: pytest.MonkeyPatch, mode: int, gid: int, groups: str
) -> None:
    class Device:
        def stat(self) -> os.stat_result:
            return os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 0, gid, 0, 0, 0, 0))

    monkeypatch.setattr(launch, "KVM_DEVICE", Device())
    assert launch.as_user(1900000002, "kvm")[3] == groups
    assert launch.as_user(1900000002, "tcg")[3] == "--clear-groups"


def test_without_kvm_there_is_no_group_for_it() -> None:
    assert launch.as_user(1900000002, "kvm") == USER


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="l-", dir="/tmp") as path:  # a socket's path holds 107 bytes
        yield Path(path)


def test_a_socket_takes_connections_while_somebody_has_its_descriptor(short: Path) -> None:
    path = short / "s"
    with launch.listening(path, os.getegid(), 0o660) as descriptor:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert not os.get_inheritable(descriptor)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(path))


def test_a_process_inherits_what_it_is_given_and_nothing_else(tmp_path: Path) -> None:
    given, kept = os.pipe()
    os.set_inheritable(kept, True)
    try:
        script = f"test -e /proc/self/fd/{given} && ! test -e /proc/self/fd/{kept} && pwd && umask && env >&2"
        with launch.spawn(("/bin/sh", "-c", script), (given,), tmp_path / "stderr") as process:
            assert process.wait(timeout=20) == 0
            assert os.getsid(0) != process.pid
    finally:
        os.close(given)
        os.close(kept)
    said = (tmp_path / "stderr").read_text().split()
    assert {"/", "0077", "LC_ALL=C"} <= set(said)
    assert stat.S_IMODE((tmp_path / "stderr").stat().st_mode) == 0o600
