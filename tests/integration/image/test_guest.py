"""What the built-in guest does, on a bare QEMU with 128 MiB and no hardware acceleration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.framework.console import TIMEOUT_S
from tests.integration.image.bare_vm import BareVm, bare_vm
from vmherd.image.registry import KernelImage


@pytest.fixture(scope="module")
def guest(builtin_image: KernelImage) -> Iterator[BareVm]:
    """One guest for all tests that leave it as it is."""
    with bare_vm(builtin_image, parameters="vmherd.hostname=web-1") as vm:
        yield vm


def test_the_agent_answers(guest: BareVm) -> None:
    assert guest.ask("guest-ping") == {}


def test_it_has_the_name_that_the_host_gave_it(guest: BareVm) -> None:
    assert guest.ask("guest-get-host-name") == {"host-name": "web-1"}
    assert guest.run("cat /etc/hostname; hostname; ping -c 1 web-1 | head -n 1").splitlines() == [
        "web-1",
        "web-1",
        "PING web-1 (127.0.1.1): 56 data bytes",
    ]


def test_it_says_what_it_is(guest: BareVm, builtin_image: KernelImage) -> None:
    answer = guest.ask("guest-get-osinfo")
    assert (answer["id"], answer["name"]) == ("vmherd-builtin", "vmherd built-in guest")
    assert answer["version-id"] == builtin_image.version
    assert answer["kernel-release"] in answer["pretty-name"]
    assert answer["machine"] == "x86_64"


def test_it_gets_an_address(guest: BareVm) -> None:
    guest.console.hear("vmherd: eth0 has the address 10.0.2.15/24")
    interfaces = {each["name"]: each for each in guest.ask("guest-network-get-interfaces")}
    assert interfaces["eth0"]["hardware-address"] == "52:54:00:12:34:56"
    v4 = [each for each in interfaces["eth0"]["ip-addresses"] if each["ip-address-type"] == "ipv4"]
    assert v4 == [{"ip-address": "10.0.2.15", "ip-address-type": "ipv4", "prefix": 24}]
    assert guest.run("ip route").startswith("default via 10.0.2.2 dev eth0 ")
    assert guest.run("cat /etc/resolv.conf") == "nameserver 10.0.2.3\n"


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("guest-get-users", []),
        ("guest-get-timezone", {"offset": 0, "zone": "UTC"}),
        ("guest-get-vcpus", [{"can-offline": False, "logical-id": 0, "online": True}]),
        ("guest-get-fsinfo", []),
        ("guest-get-disks", []),
    ],
)
def test_it_answers_questions_about_what_it_does_not_have(guest: BareVm, command: str, answer: object) -> None:
    assert guest.ask(command) == answer


def test_it_runs_commands(guest: BareVm) -> None:
    assert guest.run("echo $((6 * 7)) && id -un") == "42\nroot\n"


def test_every_driver_is_loaded(guest: BareVm) -> None:
    missing = "while read -r each; do [ -d /sys/module/$each ] || echo $each; done </etc/modules"
    assert guest.run(f'until [ -z "$({missing})" ]; do usleep 20000; done; {missing}') == ""


def test_the_console_has_a_shell_that_knows_its_host(guest: BareVm) -> None:
    guest.ask("guest-ping")  # what is typed before it has booted is lost
    guest.console.type("echo $((6 * 7)) from $(hostname)")
    guest.console.hear("42 from web-1")
    guest.console.hear("root@web-1:~# ")


def test_orphans_are_reaped(guest: BareVm) -> None:
    # The outer shell ends first, so its child has init as its parent when it ends itself.
    guest.run("sh -c 'sleep 0.1 & echo $! >/tmp/orphan'; while [ -e /proc/$(cat /tmp/orphan) ]; do usleep 20000; done")


def test_an_agent_that_dies_comes_back(guest: BareVm) -> None:
    before = guest.run("pidof qemu-ga").strip()
    guest.console.type(
        "old=$(pidof qemu-ga); kill -9 $old; until new=$(pidof qemu-ga); do usleep 20000; done; echo $old-$new"
    )
    guest.console.hear(f"{before}-")
    assert guest.run("pidof qemu-ga").strip() != before


def test_it_fits_into_its_memory(guest: BareVm) -> None:
    available_kib = int(guest.run("awk '/MemAvailable/ { print $2 }' /proc/meminfo"))
    assert available_kib > 48 * 1024


def test_without_a_name_it_has_a_default(builtin_image: KernelImage) -> None:
    with bare_vm(builtin_image) as vm:
        assert vm.ask("guest-get-host-name") == {"host-name": "vmherd-guest"}
        vm.send("guest-shutdown")
        vm.console.hear("vmherd: poweroff")
        assert vm.event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
        assert vm.process.wait(timeout=TIMEOUT_S) == 0


def test_it_reboots_and_then_obeys_the_power_button(builtin_image: KernelImage) -> None:
    with bare_vm(builtin_image, parameters="vmherd.hostname=web-1") as vm:
        before = vm.run("cat /proc/sys/kernel/random/boot_id")
        vm.send("guest-shutdown", mode="reboot")
        assert vm.event("RESET") == {"guest": True, "reason": "guest-reset"}
        assert vm.run("cat /proc/sys/kernel/random/boot_id") != before
        assert vm.ask("guest-get-host-name") == {"host-name": "web-1"}
        vm.run("until [ -s /run/acpid.pid ]; do usleep 20000; done")
        vm.monitor("system_powerdown")
        assert vm.event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
        assert vm.process.wait(timeout=TIMEOUT_S) == 0


def test_halt_stops_it_without_switching_it_off(builtin_image: KernelImage) -> None:
    with bare_vm(builtin_image) as vm:
        vm.ask("guest-ping")
        vm.send("guest-shutdown", mode="halt")
        vm.console.hear("reboot: System halted")
        assert vm.process.poll() is None


def test_shutdown_lets_processes_finish_but_does_not_wait_for_ever(builtin_image: KernelImage) -> None:
    with bare_vm(builtin_image) as vm:
        vm.ask("guest-ping")
        vm.console.hear("# ")
        vm.console.type(
            "sh -c 'trap \"usleep 200000; echo clean >/dev/console; exit\" TERM; while :; do sleep 1; done' &"
        )
        tidy = "usleep 200000; echo $((6 * 7)) is tidy >/dev/console; exit"
        for trap in (tidy, ""):
            vm.console.type(f"sh -c 'trap \"{trap}\" TERM; echo $((6 * 7)) runs; while :; do usleep 100000; done' &")
            vm.console.hear("42 runs")
        vm.send("guest-shutdown")
        vm.console.hear("42 is tidy")
        assert vm.process.wait(timeout=TIMEOUT_S) == 0


def test_it_asks_for_an_address_until_it_gets_one(builtin_image: KernelImage) -> None:
    with bare_vm(builtin_image, paused=True) as vm:
        vm.monitor("set_link", name="net0", up=False)
        vm.monitor("cont")
        vm.console.hear("vmherd: no DHCP server answers on eth0; trying again")
        vm.monitor("set_link", name="net0", up=True)
        vm.console.hear("vmherd: eth0 has the address 10.0.2.15/24")
