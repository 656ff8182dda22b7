"""Every file and directory name below the run directory and the state directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SOCKET_PATH_MAX_BYTES = 107
"""`sun_path` of unix(7) holds 108 bytes, the last of them a NUL."""


@dataclass(frozen=True)
class InstanceRun:
    """An instance's part of the run directory: sockets and process records, gone after a reboot."""

    path: Path

    @property
    def qmp(self) -> Path:
        """QEMU's control socket."""
        return self.path / "qmp.sock"

    @property
    def agent(self) -> Path:
        """The guest agent's socket."""
        return self.path / "agent.sock"

    @property
    def console(self) -> Path:
        """The serial console's socket."""
        return self.path / "console.sock"

    @property
    def sockets(self) -> tuple[Path, Path, Path]:
        """All three, in the order in which QEMU is given them."""
        return (self.qmp, self.console, self.agent)

    @property
    def process(self) -> Path:
        """The helper's record of the QEMU process."""
        return self.path / "process.json"

    @property
    def stderr(self) -> Path:
        """What QEMU writes to its standard error."""
        return self.path / "stderr.log"


@dataclass(frozen=True)
class RunDirectory:
    """The run directory."""

    path: Path

    @property
    def instances(self) -> Path:
        """Holds one directory for each instance that runs."""
        return self.path / "instances"

    @property
    def networks(self) -> Path:
        """What the helper keeps of its networks: the files of their DHCP servers."""
        return self.path / "networks"

    def instance(self, uid: str) -> InstanceRun:
        """One instance's part."""
        return InstanceRun(self.instances / uid)

    def longest_socket_path(self) -> Path:
        """The longest path of a socket that will be made here, to be measured against `SOCKET_PATH_MAX_BYTES`."""
        return self.instance("0" * 36).console


@dataclass(frozen=True)
class InstanceState:
    """An instance's part of the state directory: its disk and its console's log."""

    path: Path

    @property
    def disk(self) -> Path:
        """The instance's own disk."""
        return self.path / "disk.raw"

    @property
    def console_log(self) -> Path:
        """Everything that the guest wrote to its serial console."""
        return self.path / "console.log"


@dataclass(frozen=True)
class StateDirectory:
    """The state directory."""

    path: Path

    @property
    def store(self) -> Path:
        """The controller's records."""
        return self.path / "store.sqlite"

    @property
    def images(self) -> Path:
        """Holds one directory for each image."""
        return self.path / "images"

    @property
    def instances(self) -> Path:
        """Holds one directory for each instance."""
        return self.path / "instances"

    @property
    def accelerators(self) -> Path:
        """What the helper measured of the host's accelerators."""
        return self.path / "accelerators.json"

    def instance(self, uid: str) -> InstanceState:
        """One instance's part."""
        return InstanceState(self.instances / uid)


@dataclass(frozen=True)
class Herd:
    """What `start.sh` keeps in one run directory, and where the command line looks for it."""

    path: Path

    @property
    def settings(self) -> Path:
        """Holds `qemu.json`, `controller.json` and `gateway.json`."""
        return self.path / "settings"

    @property
    def qemu_socket(self) -> Path:
        """The helper's socket."""
        return self.path / "qemu.sock"

    @property
    def controller_socket(self) -> Path:
        """The controller's socket."""
        return self.path / "controller.sock"

    @property
    def token(self) -> Path:
        """The admin's bearer token."""
        return self.path / "token"

    @property
    def logs(self) -> Path:
        """Holds one log for each of the three processes."""
        return self.path / "logs"

    @property
    def gateway_address(self) -> Path:
        """Where the gateway listens, as `HOST:PORT`, written once it does."""
        return self.path / "gateway.address"
