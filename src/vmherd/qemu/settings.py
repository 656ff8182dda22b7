"""What the helper's settings mean on this host: everything that is wrong with them is named at once."""

from __future__ import annotations

import itertools
import os
import pwd
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal, TypeVar

from vmherd.api.settings.v1 import settings_pb2
from vmherd.api.settings.v1.settings_pb2 import QemuSettings
from vmherd.model.errors import FieldViolation, InvalidArgument
from vmherd.model.layout import RunDirectory, StateDirectory
from vmherd.model.machine import check_path
from vmherd.model.network import Network, check_network
from vmherd.qemu.files import Owners
from vmherd.qemu.uids import COUNT_DEFAULT, FIRST_DEFAULT, Uids

WANTED: Mapping[int, Literal["auto", "kvm", "tcg"]] = {
    QemuSettings.ACCELERATOR_UNSPECIFIED: "auto",
    QemuSettings.AUTO: "auto",
    QemuSettings.KVM: "kvm",
    QemuSettings.TCG: "tcg",
}
UID_END = 2**32 - 1
"""The last number of 32 bits is no uid: chown(2) takes it for 'leave it as it is'."""

Subnet = TypeVar("Subnet", IPv4Network, IPv6Network)


@dataclass(frozen=True)
class Setup:
    """The settings, understood."""

    listen: Path
    run: RunDirectory
    state: StateDirectory
    qemu_binary: str
    accelerator: Literal["auto", "kvm", "tcg"]
    owners: Owners
    uids: Uids
    networks: tuple[Network, ...]


def understood(settings: QemuSettings) -> Setup:
    """What the settings mean for the user that asks.

    Raises:
        InvalidArgument: a setting is wrong.
    """
    violations: list[FieldViolation] = []
    for field in ("listen", "run_dir", "state_dir"):
        violations += check_path(getattr(settings, field), field)
    uids = Uids(settings.uids.first or FIRST_DEFAULT, settings.uids.count or COUNT_DEFAULT)
    user, group = _user(settings.controller_user, violations)
    networks = tuple(
        _network(network, f"networks[{index}]", violations) for index, network in enumerate(settings.networks)
    )
    violations += [*_wrong_users(uids, user), *_wrong_networks(networks)]
    if settings.accelerator not in WANTED:
        violations.append(FieldViolation("accelerator", f"must be AUTO, KVM or TCG, is {settings.accelerator}"))
    if violations:
        raise InvalidArgument.of(violations)
    return Setup(
        Path(settings.listen),
        RunDirectory(Path(settings.run_dir)),
        StateDirectory(Path(settings.state_dir)),
        settings.qemu_binary,
        WANTED[settings.accelerator],
        Owners(user, group, uids.machines if os.geteuid() == 0 else None),
        uids,
        networks,
    )


def _user(name: str, violations: list[FieldViolation]) -> tuple[int, int]:
    """A user's uid and gid. A number need not be a known user's; its group has the same number then."""
    number = int(name) if name.isascii() and name.isdecimal() else None
    try:
        if not name:
            return os.geteuid(), os.getegid()
        entry = pwd.getpwnam(name) if number is None else pwd.getpwuid(number)
    except (KeyError, ValueError, OverflowError):
        if number is not None and number < UID_END:
            return number, number
        violations.append(FieldViolation("controller_user", f"there is no user {name!r} on this host"))
        return os.geteuid(), os.getegid()
    return entry.pw_uid, entry.pw_gid


def _wrong_users(uids: Uids, controller: int) -> Iterator[FieldViolation]:
    if not (uids.first > 0 and uids.machines and uids.machines.stop <= UID_END):
        yield FieldViolation("uids", f"must be 3 or more uids from 1 to {UID_END - 1}")
    if accounts := [user.pw_name for user in pwd.getpwall() if uids.first <= user.pw_uid < uids.machines.stop]:
        yield FieldViolation("uids", f"must not have users of this host among them, as {accounts[0]!r} is")
    if uids.first <= controller < uids.machines.stop:
        yield FieldViolation("uids", f"must not have the controller's user {controller} among them")
    if os.geteuid() and controller != os.geteuid():
        yield FieldViolation("controller_user", "can be another user than the helper's only where the helper is root")


def _network(message: settings_pb2.Network, field: str, violations: list[FieldViolation]) -> Network:
    def subnet(kind: type[Subnet], name: str) -> Subnet | None:
        text: str = getattr(message, name)
        try:
            return kind(text) if text else None
        except ValueError as error:
            violations.append(FieldViolation(f"{field}.{name}", str(error)))
            return None

    network = Network(
        message.name,
        message.bridge,
        subnet(IPv4Network, "subnet"),
        subnet(IPv6Network, "ipv6_subnet"),
        message.isolated,
        message.host_access,
    )
    if bool(message.subnet) == bool(network.subnet):  # or what follows from a subnet would be said to be wrong
        violations += check_network(network, field)
    return network


def _wrong_networks(networks: tuple[Network, ...]) -> Iterator[FieldViolation]:
    if networks and os.geteuid():
        yield FieldViolation("networks", "only root can make networks; run the helper as root, or leave them out")
    for (_, one), (index, other) in itertools.combinations(enumerate(networks), 2):
        for name in ("name", "bridge"):
            if getattr(one, name) == getattr(other, name):
                yield FieldViolation(
                    f"networks[{index}].{name}", f"{getattr(one, name)!r} is another network's already"
                )
        for name in ("subnet", "ipv6_subnet"):
            first, second = getattr(one, name), getattr(other, name)
            if first and second and first.overlaps(second):
                yield FieldViolation(f"networks[{index}].{name}", f"{second} overlaps that of network {one.name!r}")
