"""Where a machine is plugged in: what its description says, checked against the networks and the other machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from vmherd.model.errors import FailedPrecondition, FieldViolation, InvalidArgument
from vmherd.model.machine import Machine, Nic, NicBackend
from vmherd.model.network import Network, tap_name
from vmherd.qemu.network.dnsmasq import Lease
from vmherd.qemu.network.rules import Port


@dataclass(frozen=True)
class Plugged:
    """A machine that is plugged in."""

    name: str
    ports: tuple[Port, ...]
    former_leases: Mapping[str, Lease] = field(default_factory=dict)
    """By address, those that its network had when it was plugged in: not this run's."""


def bridged(machine: Machine) -> list[tuple[int, Nic]]:
    """The network interfaces that get a TAP device, with their indexes."""
    return [(index, nic) for index, nic in enumerate(machine.nics) if nic.backend is NicBackend.BRIDGE]


def place(machine: Machine, networks: Mapping[str, Network], plugged: Mapping[str, Plugged]) -> tuple[Port, ...]:
    """The ports that a machine gets. `networks` are by their names, `plugged` by their uids.

    Raises:
        InvalidArgument: a network is not there, or an address does not fit it.
        FailedPrecondition: another machine has the address or the MAC address.
    """
    violations = [v for index, nic in bridged(machine) for v in _violations(nic, networks, f"nics[{index}]")]
    if violations:
        raise InvalidArgument.of(violations)
    taken = {
        (port.network, value): other.name
        for uid, other in plugged.items()
        if uid != machine.uid
        for port in other.ports
        for value in (port.mac, port.ipv4_address)
    }
    ports = []
    for index, nic in bridged(machine):
        network = networks[nic.network]
        for value in filter(None, (nic.mac, nic.ipv4_address)):
            if owner := taken.get((network.name, value)):
                raise FailedPrecondition(
                    f"nics[{index}]: {value} on network {network.name!r} belongs to {owner!r}, which runs",
                    reason="ADDRESS_TAKEN",
                    metadata={"address": value, "network": network.name, "name": owner},
                )
            taken[network.name, value] = machine.name
        ipv6_address = str(network.ipv6_of(nic.mac) or "")
        ports.append(Port(network.name, tap_name(machine.uid, index), nic.mac, nic.ipv4_address, ipv6_address))
    return tuple(ports)


def fits(port: Port, network: Network | None) -> bool:
    """Whether a port of a machine that runs belongs to a network as the settings have it now."""
    if network is None or bool(network.subnet) != bool(port.ipv4_address):
        return False
    if network.subnet and IPv4Address(port.ipv4_address) not in network.subnet:
        return False
    return port.ipv6_address == str(network.ipv6_of(port.mac) or "")


def _violations(nic: Nic, networks: Mapping[str, Network], field: str) -> Iterator[FieldViolation]:
    network = networks.get(nic.network)
    if network is None:
        known = ", ".join(networks) or "none"
        yield FieldViolation(f"{field}.network", f"{nic.network!r} is not a network of this host, which has {known}")
    elif network.subnet is None:
        if nic.ipv4_address:
            yield FieldViolation(f"{field}.ipv4_address", f"is not vmherd's to give on network {network.name!r}")
    else:
        reserved = ("", *map(str, (network.subnet[0], network.gateway, network.subnet[-1])))
        if nic.ipv4_address in reserved or IPv4Address(nic.ipv4_address) not in network.subnet:
            yield FieldViolation(
                f"{field}.ipv4_address",
                f"must be in {network.subnet} and not the host's {network.gateway}, is {nic.ipv4_address!r}",
            )
