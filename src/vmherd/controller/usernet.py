"""Which ports of the host QEMU has bound for the forwards of its user-mode networks.

No QMP command tells it, only the monitor for people: `info usernet` prints libslirp's tables, in the same columns since
QEMU 2.12. What does not look like that is passed over, so that a port is either right or unknown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vmherd.model.instance import NetworkInterface
from vmherd.model.machine import PORT_MAX, Protocol

INFO_USERNET = "info usernet"

# Hub -1 (net0):
#   Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
#   TCP[HOST_FORWARD]  11       127.0.0.1 32999       10.0.2.15    22     0     0
_NETWORK = re.compile(r"\S.* \(net([0-9]{1,3})\):")
_FORWARD = re.compile(
    r"  (TCP|UDP)\[HOST_FORWARD\] +[0-9]+ +127\.0\.0\.1 +([0-9]{1,5}) +[0-9.]+ +([0-9]{1,5}) +[0-9]+ +[0-9]+"
)


def bound_ports(text: str, nics: Sequence[NetworkInterface]) -> list[tuple[int, ...]]:
    """The bound ports of each network interface, one for each of its forwards; none where one of them is not told."""
    told: dict[tuple[int, Protocol, int], list[int]] = {}
    index = -1
    for line in text.splitlines():
        if network := _NETWORK.fullmatch(line):
            index = int(network[1])
        elif (forward := _FORWARD.fullmatch(line)) and 1 <= int(forward[2]) <= PORT_MAX:
            told.setdefault((index, Protocol[forward[1]], int(forward[3])), []).append(int(forward[2]))
    return [_of_interface(told, index, nic) for index, nic in enumerate(nics)]


def _of_interface(
    told: dict[tuple[int, Protocol, int], list[int]], index: int, nic: NetworkInterface
) -> tuple[int, ...]:
    fixed = {(forward.protocol, forward.host_port) for forward in nic.forwards if forward.host_port}
    ports = []
    for forward in nic.forwards:
        of_guest_port = told.get((index, forward.protocol, forward.guest_port), [])
        free = [port for port in of_guest_port if (forward.protocol, port) not in fixed]
        port = forward.host_port or next(iter(free), 0)
        if port not in of_guest_port:
            return ()
        of_guest_port.remove(port)
        ports.append(port)
    return tuple(ports)
