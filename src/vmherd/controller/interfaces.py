"""A new instance's network interfaces: what was asked for, and for the rest what the host's networks have free."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from vmherd.model.errors import FieldViolation, InvalidArgument, ResourceExhausted
from vmherd.model.instance import Instance, NetworkInterface
from vmherd.model.machine import mac_of
from vmherd.model.network import NO_NETWORK, USER_NETWORK, Network


def assigned(
    asked: Sequence[NetworkInterface], uid: str, networks: Sequence[Network], others: Collection[Instance]
) -> tuple[NetworkInterface, ...]:
    """The network interfaces of an instance that has passed `check_launch`.

    `networks` are the host's, the default first. `others` are all the other instances: also one that is stopped keeps
    its addresses.

    Raises:
        InvalidArgument: something that was asked for does not fit the host's networks, or is another instance's.
        ResourceExhausted: a network has no address left.
    """
    if any(nic.network == NO_NETWORK for nic in asked):
        return ()
    default = networks[0].name if networks else USER_NETWORK
    nics = [
        replace(nic, network=nic.network or default, mac=nic.mac or mac_of(uid, index))
        for index, nic in enumerate(asked or (NetworkInterface(),))
    ]
    if violations := [*_of_the_host(nics, networks), *_of_others(nics, others)]:
        raise InvalidArgument.of(violations)
    by_name = {network.name: network for network in networks}
    taken = {(nic.network, nic.ipv4_address) for nic in [*nics, *(nic for other in others for nic in other.nics)]}
    for index, nic in enumerate(nics):
        if network := by_name.get(nic.network):
            address = nic.ipv4_address or _free_address(network, {a for name, a in taken if name == network.name})
            nics[index] = replace(nic, ipv4_address=address, ipv6_address=str(network.ipv6_of(nic.mac) or ""))
            taken.add((network.name, address))
    return tuple(nics)


def _free_address(network: Network, taken: Collection[str]) -> str:
    if not network.subnet:
        return ""
    address = network.free_address(taken)
    if not address:
        raise ResourceExhausted(
            f"the network {network.name!r} has no address left in {network.subnet}; an instance keeps its address "
            "until it is deleted, so delete one, or use another network",
            reason="ADDRESSES_EXHAUSTED",
            metadata={"network": network.name, "subnet": network.subnet},
        )
    return str(address)


def _of_the_host(nics: Sequence[NetworkInterface], networks: Sequence[Network]) -> Iterator[FieldViolation]:
    """What does not fit the networks that there are."""
    by_name = {network.name: network for network in networks}
    for index, nic in enumerate(nics):
        field, network = f"nics[{index}]", by_name.get(nic.network)
        if not nic.on_bridge:
            if nic.ipv4_address:
                why = f"is for a network of the host; on {USER_NETWORK!r} QEMU gives the guest its address"
                yield FieldViolation(f"{field}.ipv4_address", why)
            continue
        if not network:
            known = ", ".join([*by_name, USER_NETWORK, NO_NETWORK])
            yield FieldViolation(f"{field}.network", f"must be one of {known}, is {nic.network!r}")
            continue
        if nic.forwards:
            why = f"are for {USER_NETWORK!r}; on the network {network.name!r} the guest has an address of its own"
            yield FieldViolation(f"{field}.forwards", why)
        if nic.ipv4_address:
            yield from _check_address(nic.ipv4_address, network, f"{field}.ipv4_address")


def _check_address(text: str, network: Network, field: str) -> Iterator[FieldViolation]:
    address, subnet = ipaddress.IPv4Address(text), network.subnet
    if not subnet:
        yield FieldViolation(field, f"cannot be chosen: somebody else gives addresses on the network {network.name!r}")
    elif address == network.gateway:
        yield FieldViolation(field, f"must not be the host's own address on the network {network.name!r}")
    elif address not in subnet or address in (subnet.network_address, subnet.broadcast_address):
        why = f"must be from {subnet[2]} to {subnet[-2]} on the network {network.name!r}, is {address}"
        yield FieldViolation(field, why)


def _of_others(nics: Sequence[NetworkInterface], others: Collection[Instance]) -> Iterator[FieldViolation]:
    """What is taken already, by another instance or another network interface of the same one."""
    theirs = [(other.name, nic) for other in others for nic in other.nics]
    macs = {nic.mac: name for name, nic in theirs}
    addresses = {(nic.network, nic.ipv4_address): name for name, nic in theirs if nic.ipv4_address}
    own_macs = Counter(nic.mac for nic in nics)
    own_addresses = Counter((nic.network, nic.ipv4_address) for nic in nics if nic.ipv4_address)
    for index, nic in enumerate(nics):
        address = (nic.network, nic.ipv4_address)
        if nic.mac in macs:
            yield FieldViolation(f"nics[{index}].mac", f"{nic.mac} is that of {macs[nic.mac]!r}")
        elif own_macs[nic.mac] > 1:
            yield FieldViolation(f"nics[{index}].mac", f"{nic.mac} is that of two network interfaces")
        if address in addresses:
            why = f"{nic.ipv4_address} is that of {addresses[address]!r}, which keeps it until it is deleted"
            yield FieldViolation(f"nics[{index}].ipv4_address", why)
        elif own_addresses[address] > 1:
            yield FieldViolation(f"nics[{index}].ipv4_address", f"{nic.ipv4_address} is that of two network interfaces")
