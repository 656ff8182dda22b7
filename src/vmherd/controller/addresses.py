"""The guest's addresses, picked from what its agent says of its network interfaces."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterator

from vmherd.model.instance import Address

ADDRESSES_MAX = 64
INTERFACE_NAME_MAX_LENGTH = 64


def addresses_of(interfaces: object, macs: Collection[str]) -> tuple[Address, ...]:
    """The addresses on the interfaces with one of these MAC addresses, in the agent's order.

    `interfaces` is the result of guest-network-get-interfaces as it came: what does not have the reference's shape is
    passed over. Loopback and link-local addresses are left out, for nobody outside reaches the guest there.
    """
    found = (address for interface in _dicts(interfaces) for address in _on_interface(interface, macs))
    return tuple(address for address, _ in zip(found, range(ADDRESSES_MAX), strict=False))


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
