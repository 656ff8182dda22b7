"""The networks of the host as the rest of the helper sees them."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmherd.model.errors import FailedPrecondition, VmherdError
from vmherd.model.machine import Machine
from vmherd.model.network import Network
from vmherd.qemu.network import dnsmasq, links, rules
from vmherd.qemu.network.dnsmasq import DnsmasqFiles, Lease
from vmherd.qemu.network.forwarding import IPV4, IPV6, set_forwarding
from vmherd.qemu.network.leftovers import held, known, remove, told
from vmherd.qemu.network.links import bridge_mac
from vmherd.qemu.network.placement import Plugged, bridged, fits, place
from vmherd.qemu.network.programs import nft
from vmherd.qemu.network.rules import Port
from vmherd.qemu.network.watch import Watch

REPAIR_PAUSE_S = 0.1
"""Between the news of harm and its repair: who does harm often goes on for a moment."""
REPAIR_PAUSE_MAX_S = 5.0
QUIET_S = 5.0
"""After so long without harm the next repair comes as soon as the first one did."""

_log = structlog.get_logger()


class AddressSource(StrEnum):
    """Who says that a machine has an address, the more trusted first."""

    LEASE = "lease"
    NEIGHBOUR = "neighbour"


@dataclass(frozen=True)
class Address:
    """An address of a machine."""

    address: str
    prefix_length: int
    mac: str
    source: AddressSource


class Networks:
    """Makes the networks of the settings, plugs machines in, and puts back what somebody else takes away.

    It lives in an event loop. Everything in its directory is root's, but for what dnsmasq writes as `dnsmasq_uid`.
    """

    def __init__(self, networks: Sequence[Network], directory: Path, *, dnsmasq_uid: int) -> None:
        self.networks = tuple(networks)
        self._by_name = {network.name: network for network in networks}
        self._made = [network for network in networks if network.subnet]
        self._directory = directory
        self._dnsmasq_uid = dnsmasq_uid
        self._plugged: dict[str, Plugged] = {}
        self._servers: dict[str, int] = {}
        """Bridge → pidfd of its dnsmasq."""
        self._lock = asyncio.Lock()
        """One change at a time."""
        self._harmed = asyncio.Event()
        self._resources = AsyncExitStack()

    async def open(self, ports: Mapping[str, Sequence[Port]], names: Mapping[str, str]) -> None:
        """Makes or finds the networks, with the ports and names of the machines that run, and removes former ones.

        Raises:
            FailedPrecondition: the host is not as the settings need it, or a machine that runs does not fit them, or
                another helper is at work.
        """
        if not self.networks and not self._directory.exists():
            return
        self._plugged = {uid: Plugged(names[uid], tuple(listed)) for uid, listed in ports.items() if listed}
        # Who ends meanwhile is unplugged afterwards.
        async with self._lock, AsyncExitStack() as stack:
            with told():
                self._directory.mkdir(mode=0o755, exist_ok=True)
                self._directory.chmod(0o755)
                stack.enter_context(held(self._directory))
                self._ipr = await stack.enter_async_context(AsyncIPRoute())
                await self._check()
                await remove(self._ipr, self._directory, known(self._directory) - {it.bridge for it in self._made})
                tables = {rules.table_name(network.bridge) for network in self._made}
                self._watch = stack.enter_context(Watch(tables, self._harmed.set))
                stack.callback(self._forget_servers)
                await self._restore()
            stack.push_async_callback(_cancelled, asyncio.create_task(self._keep()))
            self._resources = stack.pop_all()

    async def close(self) -> None:
        """Lets go of the networks. They stay, and with them the machines'."""
        await self._resources.aclose()

    def ports(self, machine: Machine) -> tuple[Port, ...]:
        """Where a machine would be plugged in.

        Raises:
            InvalidArgument: a network is not there, or an address does not fit it.
            FailedPrecondition: another machine has the address or the MAC address.
        """
        return place(machine, self._by_name, self._plugged)

    def plan(self, machine: Machine) -> tuple[list[str], list[str]]:
        """The devices that `plug` would make, for people, and the rules that it would add, in lines of nft.

        Raises:
            InvalidArgument, FailedPrecondition: as `ports` says.
        """
        devices, added = [], []
        for port in self.ports(machine):
            network = self._by_name[port.network]
            addresses = ", ".join(filter(None, (port.mac, port.ipv4_address, port.ipv6_address)))
            devices.append(f"TAP {port.tap} on bridge {network.bridge} of network {network.name}: {addresses}")
            if network.subnet:
                added += rules.port_added(network.bridge, port).splitlines()
        return devices, added

    async def plug(self, machine: Machine) -> dict[int, int]:
        """Makes a machine's TAP devices: a descriptor for each index of a network interface on a bridge.

        They are the caller's; a device goes with the last descriptor of it. After an error there are none.

        Raises:
            InvalidArgument, FailedPrecondition: as `ports` says, or the host is not as it has to be.
        """
        async with self._lock:
            ports = self.ports(machine)
            taps: dict[int, int] = {}
            former = {k: v for network in self._served(ports) for k, v in dnsmasq.leases(self._files(network)).items()}
            self._plugged[machine.uid] = Plugged(machine.name, ports, former)
            try:
                with told():
                    for (index, _), port in zip(bridged(machine), ports, strict=True):
                        taps[index] = await self._plug(port)
                    for network in self._served(ports):
                        self._write_leases(network)
            except BaseException:
                for tap in taps.values():
                    os.close(tap)
                del self._plugged[machine.uid]
                self._harmed.set()  # what was done goes with the repair, which makes everything anew
                raise
            return taps

    async def unplug(self, uid: str) -> None:
        """Removes the rules and leases of a machine whose process has ended, and what is left of its TAP devices."""
        if (plugged := self._plugged.pop(uid, None)) is None:
            return
        try:
            async with self._lock:
                for port in plugged.ports:
                    await links.remove_tap(self._ipr, port.tap)
                    if port.ipv4_address:
                        await self._change(rules.port_removed(self._by_name[port.network].bridge, port))
                for network in self._served(plugged.ports):
                    self._write_leases(network)
        except BaseException as error:
            self._harmed.set()  # the repair makes everything anew, without this machine
            if not isinstance(error, (VmherdError, NetlinkError, OSError)):
                raise
            _log.warning("not unplugged in one step", uid=uid, why=str(error))

    async def addresses(self, uid: str) -> list[Address]:
        """The addresses that DHCP has given to a machine that runs, then others that the host has heard of.

        Raises:
            FailedPrecondition: the kernel does not say.
        """
        found: dict[str, Address] = {}
        plugged = self._plugged.get(uid, Plugged("", ()))
        with told():
            for port in plugged.ports:
                async for address in self._addresses(port, plugged.former_leases):
                    found.setdefault(address.address, address)
        return list(found.values())

    async def _addresses(self, port: Port, former: Mapping[str, Lease]) -> AsyncIterator[Address]:
        network = self._by_name[port.network]
        lease = dnsmasq.leases(self._files(network)).get(port.ipv4_address) if network.subnet else None
        if network.subnet and lease and lease.mac == port.mac and lease != former.get(port.ipv4_address):
            yield Address(port.ipv4_address, network.subnet.prefixlen, port.mac, AddressSource.LEASE)
        if bridge := await links.find_link(self._ipr, network.bridge):
            subnets = [interface.network for interface in await links.addresses(self._ipr, bridge)]
            for address, mac in await links.neighbours(self._ipr, bridge):
                ip = ipaddress.ip_address(address)
                if mac == port.mac and not ip.is_link_local:
                    prefix_length = next((it.prefixlen for it in subnets if ip in it), ip.max_prefixlen)
                    yield Address(address, prefix_length, mac, AddressSource.NEIGHBOUR)

    async def _check(self) -> None:
        """Refuses what no repair could set right, before anything is changed."""
        for plugged in tuple(self._plugged.values()):  # who ends meanwhile leaves
            for port in plugged.ports:
                network, tap = self._by_name.get(port.network), await links.find_link(self._ipr, port.tap)
                bridge = await links.find_link(self._ipr, network.bridge) if network else None
                moved = tap and tap.master and (bridge is None or bridge.index != tap.master)
                if moved or not fits(port, network):
                    raise _not_usable(
                        port.network,
                        f"{plugged.name!r} runs with {port.ipv4_address or port.tap} of the network as it was before "
                        "the settings changed; put them back and stop it first",
                    )
        if self._made:
            self._let_dnsmasq_through()
        for network in self.networks:
            bridge = await links.find_link(self._ipr, network.bridge)
            if network.subnet is None:
                if bridge is None:
                    _log.warning("a network's bridge does not exist", network=network.name, bridge=network.bridge)
            elif bridge is None:
                await self._check_routes(network)
            elif bridge.mac != bridge_mac(self._directory, network.bridge):
                raise _not_usable(
                    network.name,
                    f"{network.bridge} exists and is not this helper's; give the bridge another name, or leave the "
                    "subnet out to plug machines into it as it is",
                )

    def _let_dnsmasq_through(self) -> None:
        run = self._directory.parent
        run.chmod(stat.S_IMODE(run.stat().st_mode) | stat.S_IXOTH)  # the helper's own: what is in it has modes too
        if closed := [str(it) for it in run.parents if not it.stat().st_mode & stat.S_IXOTH]:
            raise FailedPrecondition(
                f"dnsmasq, which is not root, cannot reach {self._directory}: `chmod o+x {' '.join(closed)}`",
                reason="DIRECTORY_NOT_USABLE",
            )

    async def _check_routes(self, network: Network) -> None:
        if network.ipv6_subnet and (names := " ".join(await links.advertised(self._ipr))):
            raise _not_usable(
                network.name,
                f"a host with IPv6 networks is a router, and would lose its own routes over {names}, which other "
                f"routers advertise; set `net.ipv6.conf.{names}.accept_ra=2` with sysctl, or do without ipv6_subnet",
            )
        for destination in await links.routes(self._ipr):
            for subnet in network.subnets:
                if subnet.version == destination.version and subnet.overlaps(destination):
                    raise _not_usable(network.name, f"{subnet} overlaps the host's route to {destination}; change it")

    async def _restore(self) -> None:
        """Makes everything as it has to be, whatever is there."""
        set_forwarding(
            self._directory, {IPV4 for _ in self._made} | {IPV6 for network in self._made if network.ipv6_subnet}
        )
        for network in self._made:
            files = self._files(network)
            files.path.mkdir(mode=0o755, exist_ok=True)
            files.path.chmod(0o755)
            bridge = await links.find_link(self._ipr, network.bridge)
            if bridge is None:
                await dnsmasq.end(files)  # it would listen on the bridge that was there before
                bridge = await links.make_bridge(self._ipr, network.bridge, bridge_mac(self._directory, network.bridge))
            self._watch.bridges.add(bridge.index)
            ports = [port for _, port in self._ports_of(network)]
            await self._change(rules.ruleset(network, ports))
            await links.set_up_bridge(self._ipr, bridge, network)
            for stray in await links.ports_of(self._ipr, bridge):
                if links.is_tap(stray) and stray.name not in {port.tap for port in ports}:
                    await links.remove_tap(self._ipr, stray.name)
            for port in ports:
                tap = await links.find_link(self._ipr, port.tap)
                if tap is not None and tap.master != bridge.index:
                    await links.plug_in(self._ipr, tap, bridge, isolated=network.isolated)
            self._write_leases(network)
            await self._ensure_server(network)

    async def _plug(self, port: Port) -> int:
        network = self._by_name[port.network]
        bridge = await links.find_link(self._ipr, network.bridge)
        if bridge is None or bridge.kind != "bridge":
            raise _not_usable(network.name, f"there is no bridge {network.bridge}; make it, or change the settings")
        await links.forget_neighbour(self._ipr, bridge, port.mac)  # as the machine had it when it last ran
        if network.subnet:
            # First the rules, so that no frame comes in without them.
            try:
                await self._change(rules.port_added(network.bridge, port))
            except FailedPrecondition:  # somebody has taken the tables away a moment ago
                await self._change(rules.ruleset(network, [port for _, port in self._ports_of(network)]))
        descriptor = links.open_tap(port.tap)
        try:
            tap = await links.find_link(self._ipr, port.tap)
            if tap is None:
                raise _not_usable(network.name, f"somebody has taken {port.tap} away as soon as it was made")
            await links.plug_in(self._ipr, tap, bridge, isolated=network.isolated)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    async def _change(self, text: str) -> None:
        with self._watch.own_change():
            await nft(text)

    def _write_leases(self, network: Network) -> None:
        """Lets a network's server know its ports."""
        files, ports = self._files(network), self._ports_of(network)
        dnsmasq.replace_file(files.hosts, dnsmasq.hosts(ports, dnsmasq.leases(files)))
        dnsmasq.replace_file(files.names, dnsmasq.names(ports))
        self._reread(network)

    def _reread(self, network: Network) -> None:
        # Where it has ended, the next one reads the files when it starts.
        with contextlib.suppress(KeyError, ProcessLookupError):
            signal.pidfd_send_signal(self._servers[network.bridge], signal.SIGHUP)

    async def _ensure_server(self, network: Network) -> None:
        if network.bridge not in self._servers:
            pidfd = await dnsmasq.ensure(network, self._files(network), self._dnsmasq_uid)
            self._servers[network.bridge] = pidfd
            asyncio.get_running_loop().add_reader(pidfd, self._on_server_end, network)
            self._reread(network)  # one that was there knows what was so before

    def _on_server_end(self, network: Network) -> None:
        _log.warning("dnsmasq has ended", network=network.name)
        dnsmasq.reap(self._servers[network.bridge])
        self._forget_server(network.bridge)
        self._harmed.set()

    def _forget_server(self, bridge: str) -> None:
        pidfd = self._servers.pop(bridge)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)

    def _forget_servers(self) -> None:
        for bridge in tuple(self._servers):
            self._forget_server(bridge)

    async def _keep(self) -> None:
        """Puts back what somebody else takes away, again and again, and the slower the more often it goes."""
        pause_s = REPAIR_PAUSE_S
        while True:
            waited_since_s = time.monotonic()
            await self._harmed.wait()
            pause_s = _repair_pause_s(pause_s, time.monotonic() - waited_since_s)
            await asyncio.sleep(pause_s)
            self._harmed.clear()
            try:
                async with self._lock:
                    await self._restore()
            except Exception as error:  # whatever it was, the next attempt may do
                _log.error("networks not put back; trying again", why=str(error), exc_info=_unforeseen(error))
                self._harmed.set()
            else:
                _log.warning("networks put back")

    def _files(self, network: Network) -> DnsmasqFiles:
        return DnsmasqFiles(self._directory / network.bridge)

    def _served(self, ports: Sequence[Port]) -> set[Network]:
        """The networks of these ports that have a server of this helper's."""
        return {network for port in ports if (network := self._by_name[port.network]).subnet}

    def _ports_of(self, network: Network) -> list[tuple[str, Port]]:
        """The ports of a network, each with the name of its machine."""
        return [(it.name, port) for it in self._plugged.values() for port in it.ports if port.network == network.name]


def _repair_pause_s(last_s: float, quiet_s: float) -> float:
    """How long to wait with a repair: twice as long as the last time, unless it was quiet since."""
    return REPAIR_PAUSE_S if quiet_s > QUIET_S else min(2 * last_s, REPAIR_PAUSE_MAX_S)


def _unforeseen(error: Exception) -> Exception | None:
    return None if isinstance(error, (VmherdError, NetlinkError, OSError)) else error


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _not_usable(network: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"network {network!r}: {why}", reason="NETWORK_NOT_USABLE", metadata={"network": network})
