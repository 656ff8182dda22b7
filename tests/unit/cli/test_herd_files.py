from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmherd.cli.herd_files import (
    Flags,
    check_usable,
    ignored_flags,
    own_directory,
    prepare,
    settings_file,
    settings_in,
)
from vmherd.model.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from vmherd.model.layout import Herd

NAMES = ("qemu", "controller", "gateway")


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)


@pytest.fixture
def herd(tmp_path: Path) -> Herd:
    return Herd(tmp_path)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory that is not too deep for sockets, which pytest's own may be."""
    with tempfile.TemporaryDirectory(prefix="vh-", dir="/tmp") as directory:
        yield Path(directory)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_a_fresh_directory_gets_settings_and_a_token(herd: Herd, tmp_path: Path) -> None:
    found = prepare(herd, tmp_path / "state", Flags())
    assert sorted(path.name for path in herd.settings.iterdir()) == ["controller.json", "gateway.json", "qemu.json"]
    assert json.loads(settings_file(herd, "gateway").read_text()) == {
        "listen": "127.0.0.1:8080",
        "controller": str(herd.controller_socket),
        "token_file": str(herd.token),
    }
    assert found.controller.listen_tcp == ""
    assert mode(herd.token) == 0o600
    assert len(herd.token.read_text().strip()) == 43  # 256 bits in base64
    assert mode(tmp_path / "state") == 0o700


def test_flags_reach_the_settings(herd: Herd, tmp_path: Path) -> None:
    prepare(herd, tmp_path / "state", Flags(http="[::1]:81", grpc="127.0.0.1:82", accelerator="tcg"))
    qemu, controller, gateway = (json.loads(settings_file(herd, name).read_text()) for name in NAMES)
    assert qemu["accelerator"] == "TCG"
    assert controller["listen_tcp"] == "127.0.0.1:82"
    assert controller["token_file"] == str(herd.token)
    assert gateway["listen"] == "[::1]:81"


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("flags", "network"),
    [
        ({"subnet": "10.20.30.0/24"}, {"bridge": "vmherd0", "subnet": "10.20.30.0/24"}),
        ({"subnet": "10.20.30.0/24", "bridge": "br7"}, {"bridge": "br7", "subnet": "10.20.30.0/24"}),
        ({"bridge": "br7"}, {"bridge": "br7"}),
    ],
)
def test_a_network_reaches_the_settings(flags: dict[str, str], network: dict[str, str], herd: Herd) -> None:
    prepare(herd, herd.path / "state", Flags(**flags))
    assert json.loads(settings_file(herd, "qemu").read_text())["networks"] == [{"name": "default"} | network]


def test_there_is_no_network_unless_it_is_asked_for(herd: Herd) -> None:
    prepare(herd, herd.path / "state", Flags())
    assert "networks" not in json.loads(settings_file(herd, "qemu").read_text())


@pytest.mark.parametrize("flags", [{"subnet": "10.20.30.0/24"}, {"bridge": "br7"}])
def test_only_root_makes_networks(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    [flag] = flags
    with pytest.raises(PermissionDenied, match=f"--{flag}: only root .* start it as root, or without --{flag}"):
        Flags(**flags)


def test_what_is_there_is_kept_to_the_byte(herd: Herd, tmp_path: Path) -> None:
    prepare(herd, tmp_path / "state", Flags(http="127.0.0.1:81"))
    before = contents(tmp_path)
    found = prepare(herd, tmp_path / "state", Flags())
    assert contents(tmp_path) == before
    assert found.gateway.listen == "127.0.0.1:81"


def test_two_directories_have_different_tokens(tmp_path: Path, herd: Herd) -> None:
    herds = [Herd(tmp_path / name) for name in "ab"]
    for each in herds:
        each.path.mkdir()
        prepare(each, each.path / "state", Flags())
    assert herds[0].token.read_text() != herds[1].token.read_text()


def test_a_flag_that_a_file_contradicts_is_told(herd: Herd, tmp_path: Path) -> None:
    prepare(herd, tmp_path / "state", Flags())
    flags = Flags(http="127.0.0.1:99", grpc="127.0.0.1:98", accelerator="tcg")
    found = prepare(herd, tmp_path / "state", flags)
    http, grpc, accelerator = ignored_flags(herd, flags, found)
    assert http.startswith(f"--http 127.0.0.1:99 has no effect: {herd.settings}/gateway.json says 127.0.0.1:8080;")
    assert "controller.json says none" in grpc
    assert "qemu.json says auto" in accelerator


@pytest.mark.usefixtures("as_root")
def test_a_network_that_a_file_contradicts_is_told(herd: Herd) -> None:
    flags = Flags(subnet="10.20.30.0/24", bridge="br7")
    [bridge, subnet] = ignored_flags(herd, flags, prepare(herd, herd.path / "state", Flags()))
    assert bridge.startswith(f"--bridge br7 has no effect: {herd.settings}/qemu.json says none;")
    assert "--subnet 10.20.30.0/24 has no effect" in subnet
    settings_file(herd, "qemu").unlink()
    found = prepare(herd, herd.path / "state", flags)
    assert list(ignored_flags(herd, flags, found)) == []
    assert list(ignored_flags(herd, Flags(), found)) == []
    [subnet] = ignored_flags(herd, Flags(subnet="10.9.0.0/24"), found)
    assert "qemu.json says 10.20.30.0/24" in subnet


def test_a_flag_that_says_the_same_is_not_told(herd: Herd, tmp_path: Path) -> None:
    flags = Flags(http="127.0.0.1:99", accelerator="auto")
    assert list(ignored_flags(herd, flags, prepare(herd, tmp_path / "state", flags))) == []


def test_settings_of_another_directory_are_refused(herd: Herd, tmp_path: Path) -> None:
    prepare(herd, tmp_path / "state", Flags())
    herd.path.joinpath("moved").mkdir()
    moved = Herd(herd.path / "moved")
    herd.settings.rename(moved.settings)
    with pytest.raises(FailedPrecondition, match=r"moved/settings/qemu\.json says listen .* which must be"):
        prepare(moved, tmp_path / "state", Flags())


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"http": "8080"}, "--http must be HOST:PORT"),
        ({"http": ""}, "--http must be HOST:PORT"),
        ({"grpc": "127.0.0.1:x"}, "--grpc must have a port from 0 to 65535"),
        ({"subnet": ""}, "--subnet must be an IPv4 subnet, for instance 10.20.30.0/24, is ''"),
        ({"subnet": "10.9.0.1/24"}, "--subnet must be an IPv4 subnet, for instance 10.9.0.0/24, is '10.9.0.1/24'"),
        ({"subnet": "10.20.30.0"}, "--subnet must have from 16 to 29 bits, is 10.20.30.0/32"),
        ({"subnet": "fd00::/64"}, "--subnet must be an IPv4 subnet"),
        ({"bridge": ""}, "--bridge must have at most 15 letters"),
        ({"bridge": "a-name-that-is-too-long"}, "--bridge must have at most 15 letters"),
        ({"bridge": "br0;reboot"}, "--bridge must have at most 15 letters"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(flags: dict[str, str], problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        Flags(**flags)


def test_a_token_that_others_may_read_is_refused(herd: Herd, tmp_path: Path) -> None:
    herd.token.write_text("x")
    herd.token.chmod(0o644)
    with pytest.raises(FailedPrecondition, match="chmod 600"):
        prepare(herd, tmp_path / "state", Flags())


def test_a_directory_that_is_too_deep_for_sockets_is_refused(short_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as raised, own_directory(short_path / ("d" * 100)):
        pytest.fail("no socket fits there")
    assert raised.value.reason == "SOCKET_PATH_TOO_LONG"
    assert list(short_path.iterdir()) == []


def test_a_directory_belongs_to_one(short_path: Path) -> None:
    with (
        own_directory(short_path / "a" / "b"),
        pytest.raises(FailedPrecondition, match=r"is up in .* already"),
        own_directory(short_path / "a" / "b"),
    ):
        pytest.fail("two had the same directory")
    with own_directory(short_path / "a" / "b"):
        pass  # and to the next one after that


@pytest.mark.parametrize(("uid", "expected"), [(0, 0o755), (1000, 0o700)])
def test_the_run_directory_is_private_to_an_ordinary_user(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, expected: int
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: uid)
    with own_directory(short_path / "run"):
        assert mode(short_path / "run") == expected


@pytest.mark.parametrize("spoil", [lambda path: path.chmod(0o770), lambda path: path.chmod(0o707)])
def test_a_directory_that_others_may_write_to_is_refused(short_path: Path, spoil: Callable[[Path], None]) -> None:
    path = short_path / "run"
    path.mkdir()
    spoil(path)
    with pytest.raises(FailedPrecondition, match="others may write") as raised, own_directory(path):
        pytest.fail("its token could be anybody's")
    assert raised.value.reason == "DIRECTORY_NOT_PRIVATE"


def test_a_directory_of_somebody_else_is_refused(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = short_path / "run"
    path.mkdir(mode=0o755)
    found = os.stat_result((*path.stat()[:4], 65534, *path.stat()[5:]))
    monkeypatch.setattr(os, "fstat", lambda _descriptor: found)
    with pytest.raises(FailedPrecondition, match="or own it"), own_directory(path):
        pytest.fail("its settings could name any program")


def test_a_file_in_place_of_the_directory_is_told(short_path: Path) -> None:
    (short_path / "file").touch()
    with (
        pytest.raises(FailedPrecondition, match="file: not a directory; choose another with --rundir"),
        own_directory(short_path / "file" / "run"),
    ):
        pytest.fail("it cannot be made")


def test_a_directory_that_cannot_be_written_to_is_told(herd: Herd, tmp_path: Path) -> None:
    herd.settings.touch()
    with pytest.raises(FailedPrecondition, match="settings: not a directory; choose another with --rundir"):
        prepare(herd, tmp_path / "state", Flags())


def usable(herd: Herd, **flags: str) -> None:
    asked = Flags(**{"http": "127.0.0.1:0"} | flags)
    check_usable(herd, settings_in(herd, herd.path / "state", asked))


@pytest.mark.parametrize("flag", ["http", "grpc"])
def test_a_taken_port_is_told_and_not_written_down(herd: Herd, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = f"cannot listen on {address}: Address already in use; choose another address with --{flag}"
        with pytest.raises(FailedPrecondition, match=told):
            usable(herd, **{flag: address})
        assert list(herd.path.iterdir()) == []

        prepare(herd, herd.path / "state", Flags(**{"http": "127.0.0.1:0"} | {flag: address}))
        with pytest.raises(FailedPrecondition, match=rf"another address in {herd.settings}/(gateway|controller)\.json"):
            usable(herd)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_a_free_port_is_fine(herd: Herd, address: str) -> None:
    usable(herd, http=address)


def test_an_address_of_another_host_is_told(herd: Herd) -> None:
    with pytest.raises(FailedPrecondition, match="Cannot assign requested address"):
        usable(herd, http="192.0.2.1:0")


@pytest.mark.usefixtures("as_root")
def test_a_bridge_that_is_not_there_is_told_and_not_written_down(herd: Herd) -> None:
    usable(herd, bridge="none0", subnet="10.20.30.0/24")  # it will be made
    with pytest.raises(FailedPrecondition, match="there is no bridge none0; make it, or choose another with --bridge"):
        usable(herd, bridge="none0")
    assert list(herd.path.iterdir()) == []
    prepare(herd, herd.path / "state", Flags(bridge="none0"))
    with pytest.raises(FailedPrecondition, match=r"choose another in \S+/qemu\.json"):
        usable(herd)
