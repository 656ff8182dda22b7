"""What is read out of QEMU's own words on its user-mode networks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.controller.usernet import bound_ports
from vmherd.model.instance import NetworkInterface
from vmherd.model.machine import PortForward, Protocol

TCP, UDP = Protocol.TCP, Protocol.UDP

# QEMU 7.2.22, with three user-mode networks. The guest talks, and somebody talks to it.
QEMU_7_2 = (
    "Hub -1 (net0):\r\n"
    "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    "  TCP[ESTABLISHED]   22       127.0.0.1 32999       10.0.2.15    22     0     0\r\n"
    "  TCP[HOST_FORWARD]  11       127.0.0.1 32999       10.0.2.15    22     0     0\r\n"
    "  TCP[HOST_FORWARD]   9       127.0.0.1 40893       10.0.2.15    22     0     0\r\n"
    "  TCP[HOST_FORWARD]   8       127.0.0.1 34993       10.0.2.15    80     0     0\r\n"
    "  UDP[HOST_FORWARD]  10       127.0.0.1 34043       10.0.2.15    53     0     0\r\n"
    "  UDP[239 sec]       53       10.0.2.15  5355     224.0.0.252  5355     0     0\r\n"
    "Hub -1 (net1):\r\n"
    "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    "Hub -1 (net2):\r\n"
    "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    "  TCP[HOST_FORWARD] 112       127.0.0.1 33329       10.0.2.15   443     0     0\r\n"
)


def forwarding(*forwards: PortForward) -> NetworkInterface:
    return NetworkInterface("user", forwards=forwards)


def test_every_forward_gets_its_port_in_the_order_in_which_it_was_asked_for() -> None:
    nics = [
        forwarding(PortForward(UDP, 53), PortForward(TCP, 80), PortForward(TCP, 22), PortForward(TCP, 22)),
        forwarding(),
        forwarding(PortForward(TCP, 443)),
    ]
    assert bound_ports(QEMU_7_2, nics) == [(34043, 34993, 32999, 40893), (), (33329,)]


def test_a_port_that_was_asked_for_stays_with_its_forward() -> None:
    nic = forwarding(PortForward(TCP, 22), PortForward(TCP, 22, 32999), PortForward(UDP, 53, 34043))
    assert bound_ports(QEMU_7_2, [nic]) == [(40893, 32999, 34043)]


@pytest.mark.parametrize(
    "forward",
    [PortForward(TCP, 23), PortForward(UDP, 22), PortForward(TCP, 22, 8080)],
    ids=["other-port", "other-protocol", "not-bound"],
)
def test_what_qemu_does_not_tell_is_unknown(forward: PortForward) -> None:
    assert bound_ports(QEMU_7_2, [forwarding(PortForward(TCP, 80), forward)]) == [()]


@pytest.mark.parametrize(
    "line",
    [
        "  TCP[HOST_FORWARD]  11               * 32999       10.0.2.15    22     0     0",
        "  TCP[HOST_FORWARD]  11       127.0.0.1 99999       10.0.2.15    22     0     0",
        "  TCP[HOST_FORWARD]  11       127.0.0.1     0       10.0.2.15    22     0     0",
        "  TCP[HOST_FORWARD]  11       127.0.0.1 32999       10.0.2.15    22     0     0 x",
        "  TCP[HOST_FORWARD]  11       127.0.0.1 32999",
        f"Hub -1 (net{'9' * 5000}):",
        f"  TCP[HOST_FORWARD]  {'1' * 5000}       127.0.0.1 99999       10.0.2.15    22     0     0",
        "  TCP[HOST_FORWARD]  11       127.0.0.1 \u0663\u0664       10.0.2.15    22     0     0",
        "TCP[HOST_FORWARD] 11 127.0.0.1 32999 10.0.2.15 22 0 0",
        "  TCP[ESTABLISHED]   11       127.0.0.1 32999       10.0.2.15    22     0     0",
    ],
)
def test_a_line_in_another_shape_is_passed_over(line: str) -> None:
    assert bound_ports(f"Hub -1 (net0):\r\n{line}\r\n", [forwarding(PortForward(TCP, 22))]) == [()]


def test_very_many_connections_of_the_guest_are_passed_over() -> None:
    lines = "  TCP[ESTABLISHED]   22       10.0.2.15 32999     192.0.2.15    22     0     0\r\n" * 10_000
    text = QEMU_7_2.replace("  TCP[HOST_FORWARD]  11", f"{lines}  TCP[HOST_FORWARD]  11")
    assert bound_ports(text, [forwarding(PortForward(TCP, 22))]) == [(32999,)]


@given(st.text() | st.text(alphabet="Hub-1 (net0):\r\nTCP[HOST_FORWARD]127.0.0.1 22"))
def test_no_text_makes_it_fail(text: str) -> None:
    [ports] = bound_ports(text, [forwarding(PortForward(TCP, 22))])
    assert all(1 <= port <= 65535 for port in ports)
