"""The guest's addresses, picked from what its agent says of its network interfaces, and merged with what others say."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice

from vmherd.model.instance import Address

ADDRESSES_MAX = 64
INTERFACE_NAME_MAX_LENGTH = 64


def addresses_of(interfaces: object, macs: Collection[str]) -> tuple[Address, ...]:
    """The addresses on the interfaces with one of these MAC addresses, in the agent's order.

    `interfaces` is the result of guest-network-get-interfaces as it came: what does not have the reference's shape is
    passed over. Loopback and link-local addresses are left out, for nobody outside reaches the guest there.
    """
    found = (address for interface in _dicts(interfaces) for address in _on_interface(interface, macs))
    return tuple(islice(found, ADDRESSES_MAX))


def merged(*told: Iterable[Address]) -> tuple[Address, ...]:
    """All addresses, without those that one who is trusted more has told of the same network interface."""
    by_trust = sorted(chain.from_iterable(told), key=lambda address: address.source)
    shown: dict[tuple[str, str], Address] = {}
    for address in by_trust:
        shown.setdefault((address.mac, address.address), address)
    return tuple(islice(shown.values(), ADDRESSES_MAX))


def _on_interface(interface: dict[str, object], macs: Collection[str]) -> Iterator[Address]:
    mac = interface.get("hardware-address")
    name = interface.get("name")
    if not isinstance(mac, str) or mac.lower() not in macs or not isinstance(name, str):
        return
    for entry in _dicts(interface.get("ip-addresses")):
        text, prefix_length = entry.get("ip-address"), entry.get("prefix")
        if not isinstance(text, str) or not isinstance(prefix_length, int):
            continue
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        if not (address.is_loopback or address.is_link_local) and 0 <= prefix_length <= address.max_prefixlen:
            yield Address(str(address), prefix_length, mac.lower(), name[:INTERFACE_NAME_MAX_LENGTH])


def _dicts(value: object) -> Iterator[dict[str, object]]:
    return (item for item in (value if isinstance(value, list) else ()) if isinstance(item, dict))
