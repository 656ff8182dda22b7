"""Network interfaces that need no rights, and instances that start with the host."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from tests.framework.herd import HerdUnderTest
from tests.framework.idle_kernel import idle_kernel
from tests.framework.refusals import refused, violations
from vmherd.controller.autostart import BOOT_KEY

CONNECT_TIMEOUT_S = 10.0
MAC = "52:00:00:00:00:0a"
SERVED = "while true; do echo hello | nc -l -p {port}; done > /dev/null 2>&1 &"
"""Greets everybody who connects to a port of the guest."""


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody is given who asks for a free one, and that a server can still listen on."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def greeted(port: int) -> bool:
    """Whether a port of the host leads to somebody in the guest who greets."""
    try:
        with socket.create_connection(("127.0.0.1", port), CONNECT_TIMEOUT_S) as connection:
            return connection.recv(64) == b"hello\n"
    except (ConnectionError, TimeoutError):
        return False


def host_ports(instance: dict[str, Any]) -> list[int]:
    return [forward["hostPort"] for nic in instance["nics"] for forward in nic["forwards"]]


def test_ports_of_the_host_lead_into_the_guest(herd: HerdUnderTest, port: int) -> None:
    forwards = [{"guestPort": 7}, {"guestPort": 9, "hostPort": port}, {"guestPort": 7, "protocol": "UDP"}]
    web = herd.launch(nics=[{"network": "user", "forwards": forwards}])
    free, fixed, datagrams = host_ports(web)
    assert free
    assert datagrams
    assert fixed == port
    for guest_port in (7, 9):
        herd.run("sh", "-c", SERVED.format(port=guest_port))
    for host_port in (free, fixed):
        herd.eventually(lambda host_port=host_port: greeted(host_port))

    herd.restart("controller", "qemu")
    herd.wait_ready()
    found = herd.wait("web", "AGENT")
    assert host_ports(found) == [free, fixed, datagrams]
    herd.eventually(lambda: greeted(free))

    assert host_ports(herd.ask("POST", "web/stop")) == [0, fixed, 0]
    assert all(host_ports(herd.ask("POST", "web/start")))


def test_a_port_that_another_program_has_fails_the_start_until_it_is_free(herd: HerdUnderTest, port: int) -> None:
    herd.add_image("idle", idle_kernel())
    with socket.create_server(("127.0.0.1", port)):
        nics = [{"network": "user", "forwards": [{"guestPort": 22, "hostPort": port}]}]
        response = herd.http.post("/v1/instances", json={"name": "web", "image": "idle", "nics": nics})
        refused(response, 409, "ABORTED", "START_FAILED", f"tcp port {port} of 127.0.0.1", "the guest's port 22")
        assert herd.info("web")["state"] == "FAILED"
    assert host_ports(herd.ask("POST", "web/start")) == [port]


def test_several_network_interfaces_are_seen_in_their_order(herd: HerdUnderTest) -> None:
    web = herd.launch(nics=[{"network": "user", "mac": MAC.upper()}, {"network": "user"}], until="ADDRESS")
    first, second = web["nics"]
    assert (first["mac"], first["network"], second["network"]) == (MAC, "user", "user")
    seen = herd.shell("cat /sys/class/net/eth0/address /sys/class/net/eth1/address").split()
    assert seen == [MAC, second["mac"]]
    [address, *_] = web["addresses"]
    assert (address["address"], address["mac"], address["source"]) == ("10.0.2.15", MAC, "AGENT")


def test_none_is_no_network_interface(herd: HerdUnderTest) -> None:
    web = herd.launch(nics=[{"network": "none"}])
    assert web["nics"] == []
    assert herd.shell("ls /sys/class/net").split() == ["lo"]
    response = herd.http.get("/v1/instances/web/wait", params={"until": "ADDRESS"})
    assert "'web' has no network interface" in response.text


def test_a_plan_has_the_interfaces_as_they_would_be(shared_herd: HerdUnderTest) -> None:
    nics = [{"network": "user", "mac": MAC, "forwards": [{"guestPort": 22}]}]
    plan = shared_herd.http.post("/v1/instances:plan", json={"name": "web", "nics": nics}).json()
    [nic] = plan["instance"]["nics"]
    assert (nic["network"], nic["mac"], nic["forwards"][0]["protocol"]) == ("user", MAC, "TCP")
    assert any("hostfwd=tcp:127.0.0.1:0-:22" in word for word in plan["argv"])
    assert (plan["devices"], plan["rules"]) == ([], [])


def test_a_host_without_networks_says_so(shared_herd: HerdUnderTest) -> None:
    assert shared_herd.http.get("/v1/networks").json() == {"networks": []}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("nics", "field", "words"),
    [
        ([{"network": "lab"}], "nics[0].network", "must be one of user, none, is 'lab'"),
        ([{"network": "Lab"}], "nics[0].network", "must start with a lower-case letter"),
        ([{"network": "user,hostfwd=tcp::1-:2"}], "nics[0].network", "must start with a lower-case letter"),
        ([{}, {"mac": "52:54"}], "nics[1].mac", "must be a MAC address"),
        ([{"mac": "01:00:5e:00:00:01"}], "nics[0].mac", "unicast"),
        ([{"mac": MAC}, {"mac": MAC}], "nics[0].mac", "two network interfaces"),
        ([{"ipv4Address": "10.0.2.16"}], "nics[0].ipv4_address", "QEMU gives the guest its address"),
        ([{"ipv4Address": "10.0.2"}], "nics[0].ipv4_address", "must be an IPv4 address"),
        ([{"ipv6Address": "fd00::1"}], "nics[0].ipv6_address", "cannot be chosen"),
        ([{"network": "none"}, {}], "nics", "must be the only one"),
        ([{"network": "none", "mac": MAC}], "nics[0]", "nothing else can be given"),
        ([{}] * 9, "nics", "at most 8"),
        ([{"forwards": [{"guestPort": 0}]}], "nics[0].forwards[0].guest_port", "from 1 to 65535"),
        ([{"forwards": [{"guestPort": 22, "hostPort": 70000}]}], "nics[0].forwards[0].host_port", "to 65535"),
        ([{"forwards": [{"guestPort": 22, "hostPort": 80}] * 2}], "nics[0].forwards", "80/tcp is given 2 times"),
        ([{"forwards": [{"guestPort": 22}] * 65}], "nics[0].forwards", "at most 64"),
    ],
)
def test_network_interfaces_that_make_no_sense(
    shared_herd: HerdUnderTest, nics: list[dict[str, Any]], field: str, words: str
) -> None:
    for path, body in (("", {"name": "web", "nics": nics}), (":plan", {"name": "web", "nics": nics})):
        response = shared_herd.http.post(f"/v1/instances{path}", json=body)
        wrong = violations(refused(response, 400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", words))
        assert words in wrong[field]


def test_autostart_is_once_for_each_boot_of_the_host(herd: HerdUnderTest) -> None:
    herd.add_image("idle", idle_kernel())
    for name in ("wanted", "running", "unwanted"):
        herd.launch(name, image="idle", start=name == "running", until="", autostart=name == "running")
    changed = herd.http.patch("/v1/instances/wanted", json={"autostart": True}).json()
    assert changed["autostart"]
    pid = herd.qemu_pid(herd.info("running")["uid"])

    herd.restart("controller")
    herd.wait_ready()
    assert herd.info("wanted")["state"] == "STOPPED"

    # The host boots, but for the one that ran on; and the helper is late.
    herd.end("controller", "qemu")
    with contextlib.closing(sqlite3.connect(herd.state.store)) as database, database:
        last_boot = (b"of another boot", BOOT_KEY)
        assert database.execute("UPDATE entry SET value = ? WHERE key = ?", last_boot).rowcount == 1
    herd.start("controller")
    herd.eventually(lambda: herd.http.get("/readyz").status_code == 200)
    herd.eventually(lambda: herd.info("wanted")["state"] == "STARTING")
    herd.start("qemu")
    herd.wait("wanted", "QMP")
    assert herd.info("unwanted")["state"] == "STOPPED"
    assert herd.info("running")["generation"] == 1
    assert herd.qemu_pid(herd.info("running")["uid"]) == pid

    herd.ask("POST", "wanted/stop", force=True)
    herd.restart("controller")
    herd.wait_ready()
    assert herd.info("wanted")["state"] == "STOPPED"
