"""What `vmherd up` puts into a run directory before it starts anything: directories, a token, settings."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

from google.protobuf.json_format import MessageToJson

from vmherd.api.settings.v1.settings_pb2 import ControllerSettings, GatewaySettings, Network, QemuSettings
from vmherd.cli.settings import check_address, load_settings
from vmherd.model import network as network_model
from vmherd.model.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from vmherd.model.layout import Herd, RunDirectory
from vmherd.model.network import check_interface_name, check_network
from vmherd.rpc.serving import check_socket_path

DEFAULT_HTTP = "127.0.0.1:8080"
DEFAULT_NETWORK = "default"
DEFAULT_BRIDGE = "vmherd0"
EXAMPLE_SUBNET = IPv4Network("10.20.30.0/24")
TOKEN_BYTES = 32


def check_bridge(name: str) -> Iterator[str]:
    """A bridge has a name that an interface can have."""
    yield from (violation.description for violation in check_interface_name(name, ""))


def check_subnet(text: str) -> Iterator[str]:
    """A subnet is one that a network of ours can have."""
    try:
        subnet = IPv4Network(text)
    except ValueError:
        yield f"must be an IPv4 subnet, for instance {_meant_subnet(text)}, is {text!r}"
    else:
        network = network_model.Network(DEFAULT_NETWORK, DEFAULT_BRIDGE, subnet)
        yield from (violation.description for violation in check_network(network, ""))


def _meant_subnet(text: str) -> IPv4Network:
    try:
        return IPv4Interface(text).network  # of one of its addresses
    except ValueError:
        return EXAMPLE_SUBNET


@dataclass(frozen=True)
class Flags:
    """What the user asks for; None leaves the choice to the settings files, or to the defaults where there are none.

    Raises:
        InvalidArgument: an address, a subnet or a bridge's name is none.
        PermissionDenied: only root can have a network.
    """

    http: str | None = None
    grpc: str | None = None
    accelerator: str | None = None
    bridge: str | None = None
    subnet: str | None = None

    def __post_init__(self) -> None:
        if problem := next(self._problems(), None):
            raise InvalidArgument(problem)
        for flag, value in (("--bridge", self.bridge), ("--subnet", self.subnet)):
            if value is not None and os.getuid() != 0:
                raise PermissionDenied(
                    f"{flag}: only root can make networks; start it as root, or without {flag}: then instances have "
                    "QEMU's own network, and `vmherd launch --forward PORT` leads into them",
                    reason="NOT_ROOT",
                )

    def _problems(self) -> Iterator[str]:
        for flag, value, check in (
            ("--http", self.http, check_address),
            ("--grpc", self.grpc, check_address),
            ("--bridge", self.bridge, check_bridge),
            ("--subnet", self.subnet, check_subnet),
        ):
            yield from (f"{flag} {problem}" for problem in (check(value) if value is not None else ()))

    @property
    def networks(self) -> list[Network]:
        """The network of the two flags: one that is made, or where `bridge` stands alone a bridge that is there."""
        if self.bridge is None and self.subnet is None:
            return []
        return [Network(name=DEFAULT_NETWORK, bridge=self.bridge or DEFAULT_BRIDGE, subnet=self.subnet or "")]


@dataclass(frozen=True)
class HerdSettings:
    """The settings of the three processes."""

    qemu: QemuSettings
    controller: ControllerSettings
    gateway: GatewaySettings


OURS = (
    ("qemu", "listen"),
    ("qemu", "run_dir"),
    ("controller", "listen"),
    ("controller", "qemu"),
    ("controller", "run_dir"),
    ("gateway", "controller"),
)
"""Settings that must lead into the run directory, or the three would not find each other and nobody would find them."""


def fresh_settings(herd: Herd, state_dir: Path, flags: Flags) -> HerdSettings:
    """The settings for a run directory that has none."""
    run_dir, state = str(herd.path), str(state_dir)
    return HerdSettings(
        qemu=QemuSettings(
            listen=str(herd.qemu_socket),
            run_dir=run_dir,
            state_dir=state,
            accelerator=QemuSettings.Accelerator.Value((flags.accelerator or "auto").upper()),
            networks=flags.networks,
        ),
        controller=ControllerSettings(
            listen=str(herd.controller_socket),
            listen_tcp=flags.grpc or "",
            qemu=str(herd.qemu_socket),
            run_dir=run_dir,
            state_dir=state,
            token_file=str(herd.token),
        ),
        gateway=GatewaySettings(
            listen=flags.http or DEFAULT_HTTP,
            controller=str(herd.controller_socket),
            token_file=str(herd.token),
        ),
    )


def settings_in(herd: Herd, state_dir: Path, flags: Flags) -> HerdSettings:
    """The settings as they are in the files, and fresh ones in place of those that are missing; writes nothing.

    Raises:
        InvalidArgument: a settings file makes no sense.
        FailedPrecondition: the settings' directory cannot be used, or a file in it leads out of the run directory.
    """
    fresh = fresh_settings(herd, state_dir, flags)
    try:
        there = {name: path for name in vars(fresh) if (path := settings_file(herd, name)).exists()}
    except OSError as error:
        raise _unusable(herd.path, error) from error
    read = {name: load_settings(path, type(getattr(fresh, name))) for name, path in there.items()}
    found = replace(fresh, **read)
    for name, field in OURS:
        is_, must = (getattr(getattr(settings, name), field) for settings in (found, fresh))
        if is_ != must:
            raise FailedPrecondition(
                f"{settings_file(herd, name)} says {field} {is_!r}, which must be {must!r} here; "
                "correct it, or remove the file to have it written anew",
                reason="SETTINGS_OF_ANOTHER_DIRECTORY",
            )
    return found


def prepare(herd: Herd, state_dir: Path, flags: Flags) -> HerdSettings:
    """Makes what is missing and keeps what is there; gives the settings as they are in the files.

    Raises:
        InvalidArgument: a settings file makes no sense.
        FailedPrecondition: the run directory cannot be used, or a settings file leads out of it.
    """
    found = settings_in(herd, state_dir, flags)
    try:
        for directory in (herd.settings, herd.logs):
            directory.mkdir(exist_ok=True)
        _make_token(herd.token)
        for name, settings in vars(found).items():
            _write_new(
                settings_file(herd, name), MessageToJson(settings, preserving_proto_field_name=True) + "\n", 0o644
            )
    except OSError as error:
        raise _unusable(herd.path, error) from error
    for directory in {Path(found.qemu.state_dir), Path(found.controller.state_dir)}:
        try:
            _make_directory(directory, 0o700)
        except OSError as error:
            raise _unusable(directory, error) from error
    return found


def ignored_flags(herd: Herd, flags: Flags, found: HerdSettings) -> Iterator[str]:
    """One line for each flag that a settings file contradicts: the file wins."""
    accelerator = QemuSettings.Accelerator.Name(found.qemu.accelerator or QemuSettings.AUTO).lower()
    network = next(iter(found.qemu.networks), Network())
    for flag, asked, name, value in (
        ("--http", flags.http, "gateway", found.gateway.listen),
        ("--grpc", flags.grpc, "controller", found.controller.listen_tcp),
        ("--accelerator", flags.accelerator, "qemu", accelerator),
        ("--bridge", flags.bridge, "qemu", network.bridge),
        ("--subnet", flags.subnet, "qemu", network.subnet),
    ):
        if asked and asked != value:
            yield (
                f"{flag} {asked} has no effect: {settings_file(herd, name)} says {value or 'none'}; "
                "edit it, or remove it to have it written anew"
            )


def settings_file(herd: Herd, name: str) -> Path:
    """The settings file of one of the three."""
    return herd.settings / f"{name}.json"


@contextlib.contextmanager
def own_directory(path: Path) -> Iterator[None]:
    """Makes the run directory where it is missing, and is the only one who keeps processes in it.

    Raises:
        FailedPrecondition: it cannot be made, is too deep for sockets, or somebody else has it.
    """
    check_socket_path(RunDirectory(path).longest_socket_path())
    try:
        # The DHCP server of a network of root's is another user's, and finds its files in there. What is secret has a
        # mode of its own.
        _make_directory(path, 0o755 if os.getuid() == 0 else 0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(path, error) from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        _check_private(path, os.fstat(descriptor))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"vmherd is up in {path} already: `vmherd --rundir {path} list`; or choose another --rundir",
                reason="ALREADY_UP",
            ) from None
        yield


def check_usable(herd: Herd, settings: HerdSettings) -> None:
    """Refuses ports and bridges that cannot be used, before anything is written or started.

    Raises:
        FailedPrecondition: a port is taken, its host is none of this machine's, or a bridge is not there.
    """
    for name, flag, address in (
        ("gateway", "--http", settings.gateway.listen),
        ("controller", "--grpc", settings.controller.listen_tcp),
    ):
        if address:
            _check_port(address, _where(herd, name, flag))
    for network in settings.qemu.networks:
        if not network.subnet and network.bridge not in {name for _, name in socket.if_nameindex()}:
            raise FailedPrecondition(
                f"there is no bridge {network.bridge}; make it, or choose another {_where(herd, 'qemu', '--bridge')}; "
                "vmherd makes it where it has a subnet",
                reason="NO_BRIDGE",
            )


def _where(herd: Herd, name: str, flag: str) -> str:
    """Where a setting is changed: a flag is heard where there is no file yet."""
    path = settings_file(herd, name)
    return f"in {path}" if path.exists() else f"with {flag}"


def _check_port(address: str, where: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, sockaddr = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(sockaddr)
    except OSError as error:
        raise FailedPrecondition(
            f"cannot listen on {address}: {error.strerror}; choose another address {where}", reason="PORT_TAKEN"
        ) from error


def _make_directory(path: Path, mode: int) -> None:
    if not path.is_dir():
        _make_directory(path.parent, mode)
        path.mkdir()
        path.chmod(mode)


def _check_private(path: Path, found: os.stat_result) -> None:
    """Whoever else may write into the run directory could choose the token and the program that runs as QEMU."""
    if found.st_uid not in (0, os.getuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FailedPrecondition(
            f"others may write to {path}, or own it; `chown` it to yourself and `chmod go-w` it, or choose another",
            reason="DIRECTORY_NOT_PRIVATE",
        )


def _make_token(path: Path) -> None:
    _write_new(path, secrets.token_urlsafe(TOKEN_BYTES) + "\n", 0o600)
    if path.stat().st_mode & 0o077:
        raise FailedPrecondition(f"others may read the token: `chmod 600 {path}`", reason="TOKEN_NOT_PRIVATE")


def _write_new(path: Path, text: str, mode: int) -> None:
    """Writes a file that is not there yet, whole or not at all."""
    if path.exists():
        return
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    fresh.rename(path)


def _unusable(path: Path, error: OSError) -> FailedPrecondition:
    why = "not a directory" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
    return FailedPrecondition(
        f"cannot use the directory {path}: {error.filename or path}: {why}; choose another with --rundir",
        reason="DIRECTORY_UNUSABLE",
    )
