"""A host in a namespace of its own, with a helper's networks, guests that are namespaces, and a world outside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.framework.netns import Namespace, join
from tests.integration.network import helper
from vmherd.model.machine import mac_of
from vmherd.qemu.network.links import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNSETIFF

TIMEOUT_S = 30.0
POLL_S = 0.02
FRAME_MAX_BYTES = 1 << 17
DNSMASQ_UID = 1_910_000_000
"""Not the default: a helper of the host may be at work."""

LAB = {"name": "lab", "bridge": "lab0", "subnet": "10.77.0.0/24"}


class Refused(Exception):
    """What the networks refuse: a reason and a message."""


@dataclass
class Guest:
    """A machine: a namespace in whose `eth0` everything goes that comes out of its TAP device."""

    uid: str
    name: str
    ports: list[dict[str, Any]]
    namespace: Namespace
    tap: int
    ends: list[int] = field(default_factory=list)
    wire: threading.Thread | None = None

    @property
    def mac(self) -> str:
        return str(self.ports[0]["mac"])

    @property
    def address(self) -> str:
        return str(self.ports[0]["ipv4_address"])

    @property
    def ipv6_address(self) -> str:
        return str(self.ports[0]["ipv6_address"])

    @property
    def device(self) -> str:
        return str(self.ports[0]["tap"])

    def power_off(self) -> None:
        """Ends the machine as the end of its QEMU does: the TAP device goes."""
        if self.wire is not None:
            os.eventfd_write(self.ends[1], 1)
            self.wire.join(TIMEOUT_S)
            self.wire = None
            for descriptor in (self.tap, *self.ends):
                os.close(descriptor)
            self.namespace.close()


class World:
    """The host, its helper while it runs, and its guests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = Namespace()
        self.guests: list[Guest] = []
        self.dnsmasq_uid = DNSMASQ_UID
        self.networks: list[dict[str, Any]] = [dict(LAB)]
        self.process: subprocess.Popen[bytes] | None = None
        self.peer: socket.socket | None = None

    def start(self, *networks: dict[str, Any]) -> None:
        """Starts a helper with these networks, or those of before, and opens them."""
        self.networks = [dict(network) for network in networks] or self.networks
        self.spawn()
        running = {it.uid: {"name": it.name, "ports": it.ports} for it in self.guests if it.wire}
        self.ask("open", running=running)

    def spawn(self) -> None:
        """Starts a helper without opening the networks."""
        self.peer, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.settimeout(TIMEOUT_S)
        words = {"networks": self.networks, "directory": str(self.run), "dnsmasq_uid": self.dnsmasq_uid}
        with other:
            self.process = subprocess.Popen(
                [*self.host.words, sys.executable, helper.__file__, str(other.fileno()), json.dumps(words)],
                pass_fds=[other.fileno()],
                cwd=Path(__file__).parents[3],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )

    @property
    def run(self) -> Path:
        return self.directory / "run" / "networks"

    def ask(self, method: str, **arguments: Any) -> Any:
        """What the helper answers."""
        return self._ask(method, arguments)[0]

    def _ask(self, method: str, arguments: dict[str, Any]) -> tuple[Any, list[int]]:
        assert self.peer is not None
        self.peer.sendall(json.dumps([method, arguments]).encode())
        data, descriptors, _, _ = socket.recv_fds(self.peer, helper.MESSAGE_MAX_BYTES, 16)
        assert data, "the helper has ended"
        reply = json.loads(data)
        if "error" in reply:
            raise Refused(reply["error"], reply["message"])
        return reply["result"], descriptors

    def end(self, number: int = signal.SIGKILL) -> None:
        """Ends the helper: with SIGKILL, or the orderly way by closing its socket."""
        if self.process is None or self.peer is None:
            return
        if number == signal.SIGKILL:
            self.process.kill()
        self.peer.close()
        self.process.wait(timeout=TIMEOUT_S)
        self.process = self.peer = None

    def restart(self, *networks: dict[str, Any]) -> None:
        """Kills the helper and starts another one."""
        self.end()
        self.start(*networks)

    def launch(self, name: str, address: str = "", *, network: str = "lab", uid: str = "") -> Guest:
        """Plugs a machine in, and configures nothing in it."""
        uid = uid or str(uuid.uuid4())
        nics = [{"mac": mac_of(uid), "network": network, "ipv4_address": address}]
        ports, [tap] = self._ask("plug", {"uid": uid, "name": name, "nics": nics})
        guest = Guest(uid, name, ports, Namespace(), tap)
        guest.ends = [guest.namespace.call(_open_tap, "eth0"), os.eventfd(0)]
        guest.namespace.ip("link", "set", "eth0", "address", guest.mac, "up")
        guest.wire = threading.Thread(target=_copy, args=(tap, *guest.ends))
        guest.wire.start()
        self.guests.append(guest)
        return guest

    def configured(self, name: str, address: str, **words: Any) -> Guest:
        """A machine with its address and default route, as if DHCP had given them."""
        guest = self.launch(name, address, **words)
        gateway = f"{address.rpartition('.')[0]}.1"
        guest.namespace.ip("addr", "add", f"{address}/24", "dev", "eth0")
        guest.namespace.ip("route", "add", "default", "via", gateway)
        return guest

    def outside(self, address: str = "203.0.113.9", gateway: str = "203.0.113.1") -> Namespace:
        """Another computer, on a wire to the host, that knows no way to the guests but through the host."""
        outside = Namespace()
        self._others.append(outside)
        join(self.host, f"up{len(self._others)}", f"{gateway}/24", outside, "eth0", f"{address}/24")
        outside.ip("route", "add", "default", "via", gateway)
        return outside

    @property
    def _others(self) -> list[Namespace]:
        return self.__dict__.setdefault("others", [])

    def tables(self) -> list[str]:
        """The firewall tables of the host."""
        return self.host.run("nft", "list", "tables").splitlines()

    def ruleset(self) -> str:
        """All of the firewall."""
        return self.host.run("nft", "list", "ruleset")

    def links(self) -> list[str]:
        """The network interfaces of the host, without its loopback."""
        links = json.loads(self.host.ip("-json", "link"))
        return sorted(str(link["ifname"]) for link in links if link["ifname"] != "lo")

    def dnsmasqs(self) -> list[int]:
        """The dnsmasqs on these directories, as the kernel has them."""
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if os.fsencode(f"--conf-file={self.run}/") in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        return found

    def forwarding(self) -> str:
        """Whether the host forwards IPv4 packets."""
        return self.host.call(Path("/proc/sys/net/ipv4/ip_forward").read_text).strip()

    def close(self) -> None:
        """Ends everything that is left."""
        for guest in self.guests:
            guest.power_off()
        self.end()
        for pid in self.dnsmasqs():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for namespace in (self.host, *self._others):
            namespace.close()


@contextlib.contextmanager
def world() -> Iterator[World]:
    """A world without a helper yet. Afterwards a teardown leaves nothing of it, or the test has failed."""
    directory = Path(tempfile.mkdtemp(prefix="n-", dir="/tmp"))
    directory.chmod(0o711)  # dnsmasq has to reach its own
    (directory / "run").mkdir()
    it = World(directory)
    try:
        before = it.links(), it.forwarding()
        yield it
        for guest in it.guests:
            guest.power_off()
        it.end()
        it.spawn()
        it.ask("teardown")
        it.end()
        uplinks = {f"up{number + 1}" for number in range(len(it._others))}
        assert ([link for link in it.links() if link not in uplinks], it.forwarding()) == before
        assert not [table for table in it.tables() if "vmherd-" in table]
        assert it.dnsmasqs() == []
        assert not it.run.exists()
    finally:
        it.close()
        shutil.rmtree(directory)


def eventually(condition: Callable[[], Any], what: str = "it") -> Any:
    """Waits until a condition holds, and gives what it gave; for what has no event that a test could wait for."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (result := condition()):
        assert time.monotonic() < deadline_s, f"{what} did not come true within {TIMEOUT_S:g} s"
        time.sleep(POLL_S)
    return result


def _open_tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    return descriptor


def _copy(one: int, other: int, end: int) -> None:
    """A wire: what is written to one TAP device comes out of the other."""
    while True:
        readable, _, _ = select.select([one, other, end], [], [])
        if end in readable:
            return
        for source, sink in ((one, other), (other, one)):
            if source in readable:
                with contextlib.suppress(OSError):  # an interface that is down takes nothing
                    os.write(sink, os.read(source, FRAME_MAX_BYTES))
