"""DHCP and DNS of a network: a dnsmasq without root, found again by its command line, that outlives the helper."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vmherd.model.errors import FailedPrecondition
from vmherd.model.network import Network
from vmherd.qemu.network.programs import find_program
from vmherd.qemu.network.rules import Port
from vmherd.qemu.process import find_processes, open_pidfd

DOMAIN = "vmherd"
LEASE_TIME = "12h"
LEASES_MAX_BYTES = 16 << 20
READY_TIMEOUT_S = 10.0
END_TIMEOUT_S = 5.0
POLL_S = 0.01

CAPABILITIES = ("net_admin", "net_raw", "net_bind_service")
"""To fill in a neighbour's address before it has one, to send and receive where nobody has one, and ports 53 and 67."""


@dataclass(frozen=True)
class DnsmasqFiles:
    """The files of one network's dnsmasq. It reads root's, and writes in one directory of its own."""

    path: Path

    @property
    def configuration(self) -> Path:
        """What it was started with."""
        return self.path / "dnsmasq.conf"

    @property
    def hosts(self) -> Path:
        """Which MAC address gets which address."""
        return self.path / "hosts"

    @property
    def names(self) -> Path:
        """Which name has which addresses, as in /etc/hosts."""
        return self.path / "names"

    @property
    def stderr(self) -> Path:
        """What it said when it started."""
        return self.path / "stderr.log"

    @property
    def own(self) -> Path:
        """The directory that it may write to."""
        return self.path / "own"

    @property
    def leases(self) -> Path:
        """The addresses that it has given, as dnsmasq writes them."""
        return self.own / "leases"

    @property
    def ready(self) -> Path:
        """Its pid file, which is there once it serves."""
        return self.own / "pid"


class Lease(NamedTuple):
    """An address that was given."""

    mac: str
    expiry: str
    """Another one after each renewal."""


def configuration(network: Network, files: DnsmasqFiles) -> str:
    """The configuration file of a network's dnsmasq, which serves the machines that are listed and nobody else."""
    lines = [
        f"interface={network.bridge}",
        "except-interface=lo",
        "bind-interfaces",
        "no-hosts",
        "domain-needed",
        "bogus-priv",
        f"domain={DOMAIN}",
        f"local=/{DOMAIN}/",
        "dhcp-fqdn",
        "dhcp-authoritative",
        f"dhcp-hostsfile={files.hosts}",
        f"addn-hosts={files.names}",
        f"dhcp-leasefile={files.leases}",
        f"pid-file={files.ready}",
        "quiet-dhcp",
    ]
    if network.subnet:
        addresses, mask = network.subnet.network_address, network.subnet.netmask
        lines += [
            f"dhcp-range={addresses},static,{mask},{LEASE_TIME}",
            f"dhcp-lease-max={network.subnet.num_addresses}",
        ]
    if network.ipv6_subnet:
        lines += ["enable-ra", f"dhcp-range={network.ipv6_subnet.network_address},ra-only,64", "quiet-ra"]
    return "".join(f"{line}\n" for line in lines)


def hosts(ports: Iterable[tuple[str, Port]], leased: Mapping[str, Lease]) -> str:
    """The file of `dhcp-hostsfile` for ports and the names of their machines. `leased` is by address.

    An address that a machine of the past still leases is listed with both MAC addresses: dnsmasq takes it from the one
    that does not ask, and would give it to nobody otherwise.
    """
    listed = list(ports)
    present = {port.mac for _, port in listed}
    return "".join(
        f"{port.mac},{past},{port.ipv4_address},{name}\n"
        if (past := leased[port.ipv4_address].mac if port.ipv4_address in leased else port.mac) not in present
        else f"{port.mac},{port.ipv4_address},{name}\n"
        for name, port in listed
    )


def names(ports: Iterable[tuple[str, Port]]) -> str:
    """The file of `addn-hosts` for ports and the names of their machines."""
    return "".join(
        f"{address} {name}.{DOMAIN}\n"
        for name, port in ports
        for address in (port.ipv4_address, port.ipv6_address)
        if address
    )


def leases(files: DnsmasqFiles) -> dict[str, Lease]:
    """The IPv4 leases, by address. The file is dnsmasq's own, and no more trusted than dnsmasq is."""
    try:
        with open(files.leases, "rb", opener=_open_plainly) as file:
            lines = file.read(LEASES_MAX_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return {}
    # EXPIRY MAC ADDRESS NAME CLIENT-ID
    return {
        words[2]: Lease(words[1], words[0])
        for words in map(str.split, lines)
        if len(words) == 5 and words[1].count(":") == 5
    }


async def ensure(network: Network, files: DnsmasqFiles, uid: int) -> int:
    """A pidfd of the dnsmasq that serves a network as the user `uid`: the one there is, or a new one.

    Raises:
        FailedPrecondition: it does not start, or is not installed.
        OSError: a file cannot be written.
    """
    wanted = configuration(network, files)
    if _has_served(files, wanted, uid):
        running = _running(files)
        for pidfd in running[1:]:
            os.close(pidfd)
        if running:
            return running[0]
    await end(files)
    if files.own.exists() and files.own.stat().st_uid != uid:
        shutil.rmtree(files.own)  # another user's leases, which are the same for everybody again
    files.own.mkdir(mode=0o700, exist_ok=True)
    os.chown(files.own, uid, uid)
    files.ready.unlink(missing_ok=True)
    replace_file(files.configuration, wanted)
    pidfd = _spawn(files, uid)
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not files.ready.exists():
        if await has_ended(pidfd, POLL_S) or time.monotonic() > deadline_s:
            await end(files)
            os.close(pidfd)
            said = files.stderr.read_text(errors="replace").strip() or "it says nothing"
            raise FailedPrecondition(
                f"network {network.name!r}: dnsmasq does not start: {said} (it needs ports 53 and 67 on "
                f"{network.bridge}, which `ss -lunp` shows)",
                reason="DNSMASQ_DID_NOT_START",
                metadata={"network": network.name},
            )
    return pidfd


def _has_served(files: DnsmasqFiles, wanted: str, uid: int) -> bool:
    """Whether the last dnsmasq came to serve, as the user and with the configuration that are wanted now."""
    with contextlib.suppress(FileNotFoundError):
        return files.ready.exists() and files.own.stat().st_uid == uid and files.configuration.read_text() == wanted
    return False


def _spawn(files: DnsmasqFiles, uid: int) -> int:
    """Starts a dnsmasq, with what `CAPABILITIES` says and nothing else of root's, and gives its pidfd."""
    dnsmasq, setpriv = find_program("dnsmasq", package="dnsmasq-base"), find_program("setpriv", package="util-linux")
    kept = ",".join(["-all", *(f"+{name}" for name in CAPABILITIES)])
    argv = [
        *(setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"),
        *(f"--inh-caps={kept}", f"--ambient-caps={kept}", f"--bounding-set={kept}", "--"),
        *(dnsmasq, "--keep-in-foreground", _identity(files)),
    ]
    # Unlike a Popen, a process of posix_spawn may be left alone: dnsmasq goes on when the helper ends.
    pid = os.posix_spawn(
        setpriv,
        argv,
        {"LC_ALL": "C"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, files.stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return os.pidfd_open(pid)


async def end(files: DnsmasqFiles) -> None:
    """Ends the dnsmasq that has these files, if there is one."""
    for pidfd in _running(files):
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
                if await has_ended(pidfd, END_TIMEOUT_S):
                    break
        finally:
            os.close(pidfd)


async def has_ended(pidfd: int, timeout_s: float) -> bool:
    """Waits for a process's end for a while, and tells whether it came. A child is reaped."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    # A pidfd becomes readable when its process ends, whoever its parent is: pidfd_open(2).
    loop.add_reader(pidfd, over.set)
    try:
        async with asyncio.timeout(timeout_s):
            await over.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    reap(pidfd)
    return True


def reap(pidfd: int) -> None:
    """Lets go of a process that has ended, if it was a child of this one."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


def _open_plainly(path: str, flags: int) -> int:
    """Opens a file that follows no link, and never waits for somebody at a pipe's other end."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def replace_file(path: Path, text: str) -> None:
    """Gives a file, which everybody may read, another content in one step."""
    written = path.with_suffix(".tmp")
    written.write_text(text)
    written.chmod(0o644)
    written.replace(path)


def _identity(files: DnsmasqFiles) -> str:
    """The last word of the command line, which is nobody else's."""
    return f"--conf-file={files.configuration}"


def _running(files: DnsmasqFiles) -> list[int]:
    """Pidfds of the dnsmasq that has these files, and after it of its children."""
    if not files.own.exists():
        return []
    found = find_processes([_identity(files)], (0, files.own.stat().st_uid))
    return [pidfd for ticks, pid in found if (pidfd := open_pidfd(pid, ticks)) is not None]
