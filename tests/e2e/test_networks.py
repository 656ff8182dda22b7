"""Networks with all that belongs to them: real QEMU, real bridges and firewalls, in a namespace of their own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.framework.far_host import FAR_ADDRESS, OUR_ADDRESS, can_connect, far_host
from tests.framework.herd import HerdUnderTest, herd_under_test
from tests.framework.netns import Namespace, needs_root, own_network
from vmherd.cli import traces
from vmherd.image.builtin.cpio import File, archive
from vmherd.image.registry import KernelImage
from vmherd.model.network import tap_name

pytestmark = [
    needs_root,
    pytest.mark.timeout(300),
]

OURS: dict[str, Any] = {"name": "ours", "bridge": "vmtest0", "subnet": "10.77.0.0/24", "ipv6_subnet": "fd00:77::/64"}
APART: dict[str, Any] = {"name": "apart", "bridge": "vmtest1", "subnet": "10.78.0.0/24", "isolated": True}
OTHERS: dict[str, Any] = {"name": "others", "bridge": "brtest0"}
HOST = "10.77.0.1"
PORT = 7777
"""Where a guest says hello."""
TOLD_TIMEOUT_S = 120.0
"""Who has one address is asked for others every 30 s."""
LONG_NAME = "a" + "-long" * 12 + "-x"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[Namespace]:
    """Each test is in a namespace of its own, and leaves nothing in it."""
    with own_network() as namespace:
        yield namespace


@contextlib.contextmanager
def herd_on(image: KernelImage, *networks: dict[str, Any]) -> Iterator[HerdUnderTest]:
    """A herd with these networks, of which nothing is left at the end."""
    before = interfaces(), rules(), forwarding()
    with herd_under_test(image, *networks) as herd:
        yield herd
    assert (interfaces(), rules(), forwarding()) == before


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def nft(*words: str) -> str:
    return subprocess.run(["nft", *words], capture_output=True, text=True, timeout=30, check=True).stdout


def rules() -> list[str]:
    """The words of the firewall's rules; the elements of a set come in any order."""
    return sorted(re.findall(r"[^\s,{}]+", nft("list", "ruleset")))


def forwarding() -> list[str]:
    return [Path(f"/proc/sys/net/{name}").read_text() for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding")]


def addresses(herd: HerdUnderTest, name: str) -> dict[str, str]:
    """The addresses of an instance, and who has told each."""
    return {it["address"]: it["source"] for it in herd.info(name)["addresses"]}


def reaches(herd: HerdUnderTest, name: str, address: str) -> bool:
    """Whether a guest gets an answer to a ping."""
    return bool(herd.run("ping", "-c", "1", "-W", "5", address, name=name)["exitCode"] == 0)


def says_hello(herd: HerdUnderTest, name: str) -> None:
    """Has a guest say hello to everybody who connects to its `PORT`."""
    listens = f"until netstat -ltn | grep -q :{PORT}; do usleep 50000; done"
    herd.shell(f"nc -ll -p {PORT} -e echo hello >/dev/null 2>&1 </dev/null & {listens}", name=name)


def heard(address: str, port: int = PORT) -> bytes:
    with socket.create_connection((address, port), timeout=30) as connection:
        return connection.recv(100)


def dnsmasqs(herd: HerdUnderTest) -> list[int]:
    return [pid for pid, name in traces.processes(herd.directory).items() if name == "dnsmasq"]


def test_a_network_of_vmherds_own(builtin_image: KernelImage, namespace: Namespace) -> None:
    with far_host(namespace) as far, herd_on(builtin_image, OURS) as herd:
        nics = {}
        for name in ("web1", "web2"):
            [nics[name]] = herd.launch(name, start=False, until="")["nics"]
        assert [nic["network"] for nic in nics.values()] == ["ours", "ours"]
        assert [nic["ipv4Address"] for nic in nics.values()] == ["10.77.0.2", "10.77.0.3"]
        for name in nics:
            herd.ask("POST", f"{name}/start")
        for name, nic in nics.items():
            herd.wait(name, "AGENT")
            herd.eventually(lambda name=name, nic=nic: nic["ipv4Address"] in addresses(herd, name))
            says_hello(herd, name)

        they_reach_each_other_and_the_world(herd, nics["web2"])
        nobody_reaches_what_is_not_theirs(herd, far)
        it_lives_on_whoever_is_killed(herd)
        what_stops_leaves_nothing(herd, nics["web1"])


def they_reach_each_other_and_the_world(herd: HerdUnderTest, web2: dict[str, Any]) -> None:
    for address in (HOST, web2["ipv4Address"], "web2.vmherd", web2["ipv6Address"]):
        herd.eventually(lambda address=address: reaches(herd, "web1", address))
    # The far host knows no way back to 10.77.0.0/24, and sees our own address.
    assert herd.shell(f"nc -w 10 {FAR_ADDRESS} 80", name="web1") == f"{OUR_ADDRESS}\n"
    assert heard(web2["ipv4Address"]) == b"hello\n"


def nobody_reaches_what_is_not_theirs(herd: HerdUnderTest, far: Namespace) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert can_connect(far, OUR_ADDRESS, port)
        for address in (HOST, OUR_ADDRESS):  # the host's services are not the guests'
            asked = herd.run("nc", "-w", "2", address, str(port), name="web1")
            assert asked["exitCode"] != 0
    far.ip("route", "add", OURS["subnet"], "via", OUR_ADDRESS)
    assert not can_connect(far, "10.77.0.2", PORT)


def it_lives_on_whoever_is_killed(herd: HerdUnderTest) -> None:
    before = sorted(herd.qemu_pids()), rules(), interfaces()
    [dnsmasq] = dnsmasqs(herd)
    herd.end(number=signal.SIGKILL)
    os.kill(dnsmasq, signal.SIGKILL)
    assert heard("10.77.0.2") == b"hello\n"
    herd.complete()
    herd.wait("web1", "ADDRESS")
    herd.eventually(lambda: reaches(herd, "web1", "web2.vmherd"))
    assert (sorted(herd.qemu_pids()), rules(), interfaces()) == before
    [restarted] = dnsmasqs(herd)
    assert restarted != dnsmasq

    nft("flush", "ruleset")
    herd.eventually(lambda: rules() == before[1])
    os.kill(restarted, signal.SIGKILL)
    herd.eventually(lambda: reaches(herd, "web1", "web2.vmherd"))


def what_stops_leaves_nothing(herd: HerdUnderTest, nic: dict[str, Any]) -> None:
    uid = herd.info("web1")["uid"]
    user = herd.state.instance(uid).path.stat().st_uid
    assert user in users(herd)
    assert tap_name(uid, 0) in interfaces()
    assert herd.ask("POST", "web1/stop")["lastExit"]["stopStep"] == "AGENT"
    assert herd.info("web1")["nics"][0] == nic  # it keeps its address
    hosts = herd.directory / "networks" / OURS["bridge"] / "hosts"
    herd.eventually(lambda: tap_name(uid, 0) not in interfaces())
    herd.eventually(lambda: nic["mac"] not in rules() and nic["mac"] not in hosts.read_text())
    assert user not in users(herd)
    herd.ask("DELETE", "web1")
    assert not herd.state.instance(uid).path.exists()
    [mac] = [it["mac"] for it in herd.info("web2")["nics"]]
    assert mac in hosts.read_text()


def users(herd: HerdUnderTest) -> set[int]:
    """The users that the herd's processes run as."""
    found = set()
    for pid in traces.processes(herd.directory):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since it was found
            found.add(os.stat(f"/proc/{pid}").st_uid)
    return found


def test_several_interfaces_and_instances_that_cannot_reach_each_other(builtin_image: KernelImage) -> None:
    with herd_on(builtin_image, APART, OURS) as herd:
        mac = "52:54:00:00:00:aa"
        named = {"network": "ours", "mac": mac, "ipv4Address": "10.77.0.50"}
        forward = {"guestPort": PORT}
        herd.launch(LONG_NAME, nics=[{}, named, {"network": "user", "forwards": [forward]}])
        herd.launch("web2", nics=[{"network": "apart"}, {"network": "ours"}])
        for name, expected in (
            (LONG_NAME, {"10.78.0.2", "10.77.0.50", "10.0.2.15"}),
            ("web2", {"10.78.0.3", "10.77.0.2"}),
        ):
            herd.eventually(
                lambda name=name, expected=expected: addresses(herd, name).keys() >= expected, TOLD_TIMEOUT_S
            )
        first = herd.info(LONG_NAME)
        assert [nic["network"] for nic in first["nics"]] == ["apart", "ours", "user"]
        assert first["nics"][1]["mac"] == mac
        assert interfaces() >= {tap_name(first["uid"], 0), tap_name(first["uid"], 1)}

        herd.eventually(lambda: reaches(herd, "web2", "10.77.0.50"))
        herd.eventually(lambda: reaches(herd, "web2", "10.78.0.1"))
        assert not reaches(herd, "web2", "10.78.0.2")
        assert "10.77.0.50" in herd.shell(f"nslookup {LONG_NAME}.vmherd {HOST}", name="web2")

        says_hello(herd, LONG_NAME)
        [shown] = first["nics"][2]["forwards"]
        assert shown["hostPort"] > 0
        assert heard("127.0.0.1", shown["hostPort"]) == b"hello\n"

        taken = herd.http.post("/v1/instances", json={"name": "web3", "nics": [named]})
        assert taken.status_code in {400, 409}, taken.text
        assert {it["name"] for it in herd.http.get("/v1/instances").json()["instances"]} == {LONG_NAME, "web2"}


def test_a_guest_without_an_agent_has_addresses_as_well(builtin_image: KernelImage, namespace: Namespace) -> None:
    namespace.ip("link", "add", OTHERS["bridge"], "type", "bridge")
    namespace.ip("address", "add", "10.79.0.1/24", "dev", OTHERS["bridge"])
    namespace.ip("link", "set", OTHERS["bridge"], "up")
    with herd_on(builtin_image, OURS, OTHERS) as herd:
        add_image_without_agent(herd, builtin_image)
        launched = herd.launch("web", until="ADDRESS", image="silent", nics=[{}, {"network": "others"}])
        ours, others = launched["nics"]
        # The neighbour table may know of it a moment earlier.
        herd.eventually(lambda: addresses(herd, "web").get(ours["ipv4Address"]) == "LEASE", TOLD_TIMEOUT_S)
        assert (others["ipv4Address"], others["ipv6Address"]) == ("", "")

        # Nobody on the other bridge gives addresses, so this one is set by hand.
        herd.eventually(lambda: "no DHCP server answers on eth1" in herd.console(launched["uid"]))
        with herd.at_console("web") as console:
            console.type("ip address add 10.79.0.7/24 dev eth1 && ping -c 1 -W 20 10.79.0.1 && echo pi''nged")
            console.hear("pinged")
        herd.eventually(lambda: addresses(herd, "web").get("10.79.0.7") == "NEIGHBOUR", TOLD_TIMEOUT_S)
        assert "AGENT" not in addresses(herd, "web").values()
        herd.ask("DELETE", "web?force=true")
    assert OTHERS["bridge"] in interfaces()


def add_image_without_agent(herd: HerdUnderTest, image: KernelImage) -> None:
    """Puts the built-in guest as `silent` beside itself, less its agent: a second archive that replaces one file."""
    directory = Path(shutil.copytree(image.kernel.parent, herd.state.images / "silent"))
    services = ("::sysinit:/etc/init.d/boot", "::respawn:/etc/init.d/network", "ttyS0::respawn:-/bin/sh")
    initramfs = image.initramfs.read_bytes()
    padding = bytes(-len(initramfs) % 4)
    inittab = archive({"etc/inittab": File("".join(f"{line}\n" for line in services).encode())})
    (directory / "initramfs").write_bytes(initramfs + padding + inittab)
