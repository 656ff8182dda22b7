from __future__ import annotations

import pytest
import typer

from vmherd.api.v1.instance_pb2 import Nic, PortForward
from vmherd.cli.values import nics

SSH = PortForward(protocol=PortForward.TCP, guest_port=22)


@pytest.mark.parametrize(
    ("networks", "forwards", "expected"),
    [
        ([], [], []),
        (["none"], [], [Nic(network="none")]),
        (["default", "lan"], [], [Nic(network="default"), Nic(network="lan")]),
        (
            ["lan,mac=52:54:00:AB:CD:EF,address=10.0.0.9"],
            [],
            [Nic(network="lan", mac="52:54:00:ab:cd:ef", ipv4_address="10.0.0.9")],
        ),
        ([], ["22"], [Nic(network="user", forwards=[SSH])]),
        (["lan", "user"], ["22"], [Nic(network="lan"), Nic(network="user", forwards=[SSH])]),
        (
            ["user"],
            ["2222:22", "0:80/tcp", "5353:53/udp"],
            [
                Nic(
                    network="user",
                    forwards=[
                        PortForward(protocol=PortForward.TCP, host_port=2222, guest_port=22),
                        PortForward(protocol=PortForward.TCP, guest_port=80),
                        PortForward(protocol=PortForward.UDP, host_port=5353, guest_port=53),
                    ],
                )
            ],
        ),
    ],
)
def test_network_interfaces(networks: list[str], forwards: list[str], expected: list[Nic]) -> None:
    assert nics(networks, forwards) == expected


@pytest.mark.parametrize(
    "network", ["", ",mac=52:54:00:ab:cd:ef", "mac=1", "lan,mac", "lan,mac=", "lan,ip=1", "lan,mac=1,mac=2", "lan,"]
)
def test_what_is_no_network(network: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"--network wants NAME\[,mac=MAC\]\[,address=IPV4\], got "):
        nics([network], [])


@pytest.mark.parametrize(
    "forward", ["", "ssh", "22/sctp", ":22", "22:", "127.0.0.1:22:22", "222222", "-1", "22 ", "²²"]
)
def test_what_is_no_forward(forward: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"--forward wants \[HOST_PORT:\]GUEST_PORT\[/udp\], got "):
        nics([], [forward])


@pytest.mark.parametrize(
    ("networks", "forwards", "problem"),
    [
        (["none", "lan"], [], "none stands for no network"),
        (["lan"], ["22"], "add `--network user`"),
        (["none"], ["22"], "add `--network user`"),
    ],
)
def test_what_does_not_go_together(networks: list[str], forwards: list[str], problem: str) -> None:
    with pytest.raises(typer.BadParameter, match=problem):
        nics(networks, forwards)
