"""The firewall of a network, as text for nft: pure functions.

Each network has two tables, called after its bridge. The `inet` one guards the host and the network's border; the
`bridge` one lets nothing in through a machine's port but what the machine may send.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network

from vmherd.model.network import Network, eui64

LINK_LOCAL = IPv6Network("fe80::/64")
HOST_LINK_LOCAL = LINK_LOCAL[1]
"""What the host is called on every network with IPv6, so that guests find it whatever its prefix."""


SETS: Mapping[str, str] = {
    "ports": "type ifname",
    "macs": "type ifname . ether_addr",
    "ipv4": "type ifname . ipv4_addr",
    "ipv6": "type ifname . ipv6_addr",
    "targets": "typeof iifname . @th,64,128",
    "clients": "typeof iifname . @th,288,48",
}
"""What each port has: sets, and what they hold. The last two have those of `ipv6` and `macs` as neighbour discovery and
DHCP write them."""

_ARP = "arp htype 1 arp ptype ip arp hlen 6 arp plen 4 iifname . arp saddr ether @macs"

FROM_GUEST: Sequence[str] = (
    "iifname . ether saddr != @macs drop",
    f"{_ARP} iifname . arp saddr ip @ipv4 accept",
    # Whether somebody has an address is asked before it is taken. For others' addresses it would deny them those.
    f"{_ARP} arp operation request arp saddr ip 0.0.0.0 iifname . arp daddr ip @ipv4 accept",
    # What a DHCP server or a router sends.
    "udp dport { 68, 546 } drop",
    "icmpv6 type { nd-router-advert, nd-redirect, mld-listener-query } drop",
    # Whoever asks a DHCP server in another's name could decline that one's address. A fragment has no port, and its
    # first one without the MAC address inside is no use to anybody.
    "udp dport 67 iifname . ip saddr @ipv4 iifname . @th,288,48 @clients accept",
    "udp dport 67 ip saddr 0.0.0.0 ip daddr 255.255.255.255 iifname . @th,288,48 @clients accept",
    "udp dport 67 drop",
    "iifname . ip saddr @ipv4 accept",
    "icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @targets drop",
    "iifname . ip6 saddr @ipv6 accept",
    "ip6 saddr :: icmpv6 type nd-neighbor-solicit iifname . @th,64,128 @targets accept",
    "ip6 saddr :: icmpv6 type { nd-router-solicit, mld-listener-report, mld2-listener-report } accept",
    # What is left: others' addresses, and other protocols, such as a VLAN's tag that would hide an address.
    "drop",
)


@dataclass(frozen=True)
class Port:
    """A machine's place on a network."""

    network: str
    tap: str
    mac: str
    ipv4_address: str = ""
    """Empty on a bridge whose addresses are somebody else's."""
    ipv6_address: str = ""
    """Empty where the network has no IPv6."""


def table_name(bridge: str) -> str:
    """The name of both tables of a network."""
    return f"vmherd-{bridge}"


def removal(bridge: str) -> str:
    """What removes a network's tables, whether or not they are there."""
    return "".join(
        f"add table {family} {table_name(bridge)}\ndelete table {family} {table_name(bridge)}\n"
        for family in ("inet", "bridge")
    )


def ruleset(network: Network, ports: Sequence[Port]) -> str:
    """What replaces a network's tables, whatever there was, in one step."""
    return removal(network.bridge) + _border(network, ports) + _guests(network.bridge, ports)


def _border(network: Network, ports: Sequence[Port]) -> str:
    """The table that keeps guests from the host and the world from the guests, and gives guests the host's address."""
    bridge = network.bridge
    return _table(
        "inet",
        bridge,
        _set("ports", ports),
        _chain("to-host", _services(network)),
        # The first is for those addresses of Ethernet that a bridge leaves to its ports: what guests send there would
        # reach the host past all other rules.
        _chain(
            "input",
            ["iifname @ports drop", f'iifname "{bridge}" goto to-host'],
            hook="filter hook input priority filter",
        ),
        _chain("forward", _forwards(network), hook="filter hook forward priority filter"),
        _chain("postrouting", _masquerades(network), hook="nat hook postrouting priority srcnat"),
    )


def _services(network: Network) -> Iterator[str]:
    if network.host_access:
        return
    yield "ct state established,related accept"
    yield f"ip daddr {{ {network.gateway}, 255.255.255.255 }} udp dport 67 accept"
    yield f"ip daddr {network.gateway} meta l4proto {{ tcp, udp }} th dport 53 accept"
    yield "icmp type echo-request accept"
    if network.ipv6_gateway:
        own = f"{{ {network.ipv6_gateway}, {HOST_LINK_LOCAL} }}"
        yield f"ip6 daddr {own} meta l4proto {{ tcp, udp }} th dport 53 accept"
        yield "icmpv6 type { echo-request, nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept"
    yield "drop"


def _forwards(network: Network) -> Iterator[str]:
    # A packet between two ports comes here if the host routes it, or hands bridged ones to its IP firewall.
    among_themselves = "drop" if network.isolated else "accept"
    yield f'iifname "{network.bridge}" oifname "{network.bridge}" {among_themselves}'
    yield f'oifname "{network.bridge}" ct state established,related accept'
    yield f'oifname "{network.bridge}" drop'


def _masquerades(network: Network) -> Iterator[str]:
    for subnet in network.subnets:
        ip = "ip" if subnet.version == 4 else "ip6"
        yield f'{ip} saddr {subnet} {ip} daddr != {subnet} oifname != "{network.bridge}" masquerade'


def _guests(bridge: str, ports: Sequence[Port]) -> str:
    """The table that lets in of a port what its machine may send: sets of what each has, and one chain for all.

    Frames of interfaces that somebody else put on the bridge are let through.
    """
    return _table(
        "bridge",
        bridge,
        *(_set(name, ports) for name in SETS),
        _chain("from-guest", FROM_GUEST),
        _chain("prerouting", ["iifname @ports goto from-guest"], hook="filter hook prerouting priority filter"),
    )


def _set(name: str, ports: Iterable[Port]) -> str:
    elements = ", ".join(element for port in ports for element in _elements(port)[name])
    return _block(f"set {name}", [SETS[name], *([f"elements = {{ {elements} }}"] if elements else [])])


def port_added(bridge: str, port: Port) -> str:
    """What adds a port to a network's tables. It takes the same time however many there are."""
    return _changed("add", bridge, port)


def port_removed(bridge: str, port: Port) -> str:
    """What removes a port that is there."""
    return _changed("delete", bridge, port)


def _changed(verb: str, bridge: str, port: Port) -> str:
    return "".join(
        f"{verb} element {family} {table_name(bridge)} {name} {{ {', '.join(elements)} }}\n"
        for family, name in (("inet", "ports"), *(("bridge", name) for name in SETS))
        if (elements := _elements(port)[name])
    )


def _elements(port: Port) -> Mapping[str, Sequence[str]]:
    """What a port adds to each set."""
    tap = f'"{port.tap}"'
    own = [eui64(LINK_LOCAL, port.mac), IPv6Address(port.ipv6_address)] if port.ipv6_address else []
    return {
        "ports": [tap],
        "macs": [f"{tap} . {port.mac}"],
        "ipv4": [f"{tap} . {port.ipv4_address}"],
        "ipv6": [f"{tap} . {address}" for address in own],
        "targets": [f"{tap} . 0x{int(address):032x}" for address in own],
        "clients": [f"{tap} . 0x{port.mac.replace(':', '')}"],
    }


def _table(family: str, bridge: str, *blocks: str) -> str:
    return "".join([f"table {family} {table_name(bridge)} {{\n", *blocks, "}\n"])


def _chain(name: str, rules: Iterable[str], *, hook: str = "") -> str:
    return _block(f"chain {name}", [f"type {hook}; policy accept;", *rules] if hook else rules)


def _block(head: str, lines: Iterable[str]) -> str:
    return "\n".join([f"    {head} {{", *(f"        {line}" for line in lines), "    }\n"])
