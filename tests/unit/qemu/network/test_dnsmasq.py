"""The files of a dnsmasq: those that it reads, and the one that it writes, which is not to be trusted."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from vmherd.model.network import Network
from vmherd.qemu.network import dnsmasq
from vmherd.qemu.network.dnsmasq import DnsmasqFiles, Lease
from vmherd.qemu.network.programs import find_program
from vmherd.qemu.network.rules import Port

WEB = Port("lab", "vm0", "52:54:00:00:00:07", "10.77.0.7", "fd77::7")
DB = Port("lab", "vm1", "52:54:00:00:00:08", "10.77.0.8")
PAST = "52:54:00:00:00:99"


@pytest.fixture
def files(tmp_path: Path) -> DnsmasqFiles:
    it = DnsmasqFiles(tmp_path)
    it.own.mkdir()
    return it


def test_each_machine_has_a_lease_and_a_name() -> None:
    ports = [("web", WEB), ("db", DB)]
    assert dnsmasq.hosts(ports, {}).splitlines() == [
        "52:54:00:00:00:07,10.77.0.7,web",
        "52:54:00:00:00:08,10.77.0.8,db",
    ]
    assert dnsmasq.names(ports).splitlines() == ["10.77.0.7 web.vmherd", "fd77::7 web.vmherd", "10.77.0.8 db.vmherd"]


def test_an_address_is_taken_from_a_machine_of_the_past_and_from_no_other() -> None:
    leased = {WEB.ipv4_address: Lease(PAST, "1"), DB.ipv4_address: Lease(WEB.mac, "1")}
    assert dnsmasq.hosts([("web", WEB), ("db", DB)], leased).splitlines() == [
        f"{WEB.mac},{PAST},10.77.0.7,web",
        f"{DB.mac},10.77.0.8,db",
    ]


@pytest.mark.parametrize("ipv6", [None, IPv6Network("fd77::/64")])
def test_dnsmasq_takes_the_configuration(files: DnsmasqFiles, ipv6: IPv6Network | None) -> None:
    network = Network("lab", "lab0", IPv4Network("10.77.0.0/24"), ipv6)
    files.configuration.write_text(dnsmasq.configuration(network, files))
    program = find_program("dnsmasq", package="dnsmasq-base")
    result = subprocess.run(
        [program, "--test", f"--conf-file={files.configuration}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_leases_are_read(files: DnsmasqFiles) -> None:
    files.leases.write_text(f"1 {WEB.mac} 10.77.0.7 web 01:{WEB.mac}\n2 {PAST} 10.77.0.9 * *\nduid 00:01\n")
    assert dnsmasq.leases(files) == {"10.77.0.7": Lease(WEB.mac, "1"), "10.77.0.9": Lease(PAST, "2")}


def test_a_file_of_leases_may_be_missing_or_anything(files: DnsmasqFiles) -> None:
    assert dnsmasq.leases(files) == {}
    files.leases.write_bytes(b"\xff\0\n1 2 3\n" * 10)
    assert dnsmasq.leases(files) == {}
    files.leases.unlink()
    os.mkfifo(files.leases)
    assert dnsmasq.leases(files) == {}
    files.leases.unlink()
    (files.path / "secret").write_text(f"1 {WEB.mac} 10.77.0.7 web *\n")
    files.leases.symlink_to(files.path / "secret")
    assert dnsmasq.leases(files) == {}
    files.leases.unlink()
    files.leases.mkdir()
    assert dnsmasq.leases(files) == {}


def test_only_a_process_whose_last_word_names_the_files_is_ended(files: DnsmasqFiles) -> None:
    word = f"--conf-file={files.configuration}"
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    processes = [subprocess.Popen([*sleep, *words], stdout=subprocess.PIPE) for words in ([word], [word, "more"])]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        asyncio.run(dnsmasq.end(files))
        assert not Path(f"/proc/{processes[0].pid}").exists()
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
