"""What the helper's settings mean."""

from __future__ import annotations

import os
import pwd
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest

from vmherd.api.settings.v1.settings_pb2 import Network as NetworkSettings
from vmherd.api.settings.v1.settings_pb2 import QemuSettings, UidRange
from vmherd.model.errors import InvalidArgument
from vmherd.model.network import Network
from vmherd.qemu.settings import Setup, understood
from vmherd.qemu.uids import Uids

PATHS = {"listen": "/run/vmherd/qemu.sock", "run_dir": "/run/vmherd", "state_dir": "/var/lib/vmherd"}
OFFICE = NetworkSettings(name="office", bridge="vmbr0", subnet="10.20.30.0/24", ipv6_subnet="fd00:1::/64")


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "getegid", lambda: 0)


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(os, "getegid", lambda: 5678)


def setup(**settings: Any) -> Setup:
    return understood(QemuSettings(**PATHS | settings))


def wrong(**settings: Any) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        setup(**settings)
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.mark.usefixtures("as_user")
def test_without_root_everything_is_one_user_s() -> None:
    owners = setup().owners
    assert (owners.controller, owners.group, owners.machines) == (1234, 5678, None)
    assert owners.mode(0o770) == 0o700
    assert owners.trusted == {1234}


@pytest.mark.usefixtures("as_root")
def test_root_has_users_for_machines() -> None:
    it = setup()
    assert (it.owners.controller, it.owners.group) == (0, 0)
    assert it.owners.machines == range(1900000002, 1900065536)
    assert it.owners.mode(0o770) == 0o700  # root needs no group
    assert setup(uids=UidRange(first=5000, count=3)).uids == Uids(5000, 3)


@pytest.mark.usefixtures("as_root")
def test_a_controller_of_another_user_gets_at_things_by_its_group() -> None:
    nobody = pwd.getpwnam("nobody")
    for name in ("nobody", str(nobody.pw_uid)):
        owners = setup(controller_user=name).owners
        assert (owners.controller, owners.group) == (nobody.pw_uid, nobody.pw_gid)
        assert owners.mode(0o770) == 0o770
        assert owners.trusted == {0, nobody.pw_uid}
    unknown = setup(controller_user="64999").owners
    assert (unknown.controller, unknown.group) == (64999, 64999)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("name", ["no-such-user", "-1", "4294967295", "1" * 40, "x\0y", "٣"])
def test_a_user_that_is_none(name: str) -> None:
    assert wrong(controller_user=name) == {"controller_user": f"there is no user {name!r} on this host"}


@pytest.mark.usefixtures("as_user")
def test_another_user_is_for_root_alone() -> None:
    assert setup(controller_user="1234").owners.controller == 1234
    assert set(wrong(controller_user="0")) == {"controller_user"}


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(("first", "count"), [(5000, 2), (2**32 - 3, 3), (2**32 - 1, 2**32 - 1), (1, 2**32 - 1)])
def test_a_range_of_users_that_is_none(first: int, count: int) -> None:
    assert set(wrong(uids=UidRange(first=first, count=count))) == {"uids"}


def test_machines_do_not_run_as_users_of_the_host() -> None:
    assert "'daemon'" in wrong(uids=UidRange(first=1, count=10))["uids"]


@pytest.mark.usefixtures("as_root")
def test_the_controller_is_no_machine() -> None:
    assert set(wrong(uids=UidRange(first=5000, count=10), controller_user="5009")) == {"uids"}


@pytest.mark.usefixtures("as_root")
def test_networks_are_taken_over() -> None:
    assert setup(networks=[OFFICE, NetworkSettings(name="lab", bridge="br0")]).networks == (
        Network("office", "vmbr0", IPv4Network("10.20.30.0/24"), IPv6Network("fd00:1::/64")),
        Network("lab", "br0"),
    )


@pytest.mark.usefixtures("as_user")
def test_networks_are_for_root_alone() -> None:
    assert wrong(networks=[OFFICE]) == {
        "networks": "only root can make networks; run the helper as root, or leave them out"
    }


@pytest.mark.usefixtures("as_root")
def test_all_that_is_wrong_is_named_at_once() -> None:
    networks = [
        OFFICE,
        NetworkSettings(name="Office", bridge="a bridge", subnet="10.0.0.1/24"),
        NetworkSettings(name="user", bridge="br1", subnet="10.20.0.0/16", ipv6_subnet="fd00::/63"),
        NetworkSettings(name="office", bridge="vmbr0", ipv6_subnet="nonsense"),
    ]
    assert set(wrong(run_dir="run", controller_user="no-such-user", networks=networks)) == {
        "run_dir",
        "controller_user",
        "networks[1].subnet",
        "networks[2].name",
        "networks[2].ipv6_subnet",
        "networks[2].subnet",
        "networks[3].name",
        "networks[3].bridge",
        "networks[3].ipv6_subnet",
    }


def test_an_accelerator_that_does_not_exist_is_named() -> None:
    assert wrong(accelerator=99) == {"accelerator": "must be AUTO, KVM or TCG, is 99"}
