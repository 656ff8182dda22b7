"""What it takes to plug a machine into a network: by the helper's own code, and by the programs that people use.

It runs in a network namespace of its own, so the host's network is left alone.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from uuid import UUID

from vmherd.model.machine import KernelBoot, Machine, Nic, NicBackend, mac_of
from vmherd.model.network import Network, tap_name
from vmherd.qemu.network import rules
from vmherd.qemu.network.leftovers import teardown
from vmherd.qemu.network.networks import Networks
from vmherd.qemu.uids import Uids

ROUNDS = 40
OTHERS = 50
"""Machines that are plugged in already."""
LIMIT_MS = 20

NETWORK = Network("bench", "bench0", IPv4Network("10.0.0.0/24"))
PEER = "peer"
"""The programs have tables of their own, or the helper would put its own back."""
TIMEOUT_S = 120


def measure() -> None:
    """Measures in a namespace, and prints."""
    if os.getuid() != 0:
        print("\nA machine's network is not measured: it takes root")
        return
    code = "import asyncio; from benchmarks import network; asyncio.run(network.compare())"
    subprocess.run(["unshare", "--net", "--", sys.executable, "-c", code], check=True, timeout=TIMEOUT_S)


async def compare() -> None:
    """Measures in the network namespace that it is called in, and leaves it as it was."""
    ours_s, theirs_s = [], []
    async with _networks() as networks:
        machine = _machine(0)
        ports = [port for number in range(1, OTHERS + 1) for port in networks.ports(_machine(number))]
        _nft(rules.ruleset(replace(NETWORK, bridge=PEER), ports))
        for _ in range(ROUNDS):
            ours_s.append(await _by_helper(networks, machine))
            theirs_s.append(_by_programs(networks, machine))
    ours_ms, theirs_ms = (1e3 * statistics.median(times_s) for times_s in (ours_s, theirs_s))
    print(f"\nTAP, bridge port, rules and lease of one machine, beside {OTHERS} others, medians of {ROUNDS} in turn")
    print(f"  ip and nft             {theirs_ms:8.3f} ms   ratio 1.00 (without a lease)")
    print(f"  vmherd qemu            {ours_ms:8.3f} ms   ratio {ours_ms / theirs_ms:.2f} (at most {LIMIT_MS} ms)")


async def _by_helper(networks: Networks, machine: Machine) -> float:
    start_s = time.perf_counter()
    taps = await networks.plug(machine)
    elapsed_s = time.perf_counter() - start_s
    for descriptor in taps.values():
        os.close(descriptor)
    await networks.unplug(machine.uid)
    return elapsed_s


def _by_programs(networks: Networks, machine: Machine) -> float:
    [port], tap = networks.ports(machine), tap_name(machine.uid, 0)
    start_s = time.perf_counter()
    _nft(rules.port_added(PEER, port))
    for words in (
        ("tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr"),
        ("link", "set", tap, "master", NETWORK.bridge),
        ("link", "set", tap, "up"),
    ):
        subprocess.run(["ip", *words], check=True)
    elapsed_s = time.perf_counter() - start_s
    subprocess.run(["ip", "link", "del", tap], check=True)
    _nft(rules.port_removed(PEER, port))
    return elapsed_s


def _nft(text: str) -> None:
    subprocess.run(["nft", "--file", "-"], input=text, text=True, check=True)


@contextlib.asynccontextmanager
async def _networks() -> AsyncIterator[Networks]:
    with tempfile.TemporaryDirectory(prefix="vmherd-") as directory:
        os.chmod(directory, 0o755)  # dnsmasq, which is another user's, reads in it
        networks = Networks([NETWORK], Path(directory) / "networks", dnsmasq_uid=Uids().dnsmasq)
        await networks.open({}, {})
        try:
            with contextlib.ExitStack() as taps:
                for number in range(1, OTHERS + 1):
                    for descriptor in (await networks.plug(_machine(number))).values():
                        taps.callback(os.close, descriptor)
                yield networks
        finally:
            await networks.close()
            await teardown([NETWORK], Path(directory) / "networks")


def _machine(number: int) -> Machine:
    uid = str(UUID(int=number))
    address = NETWORK.subnet[number + 2] if NETWORK.subnet else None
    nic = Nic(mac_of(uid), NicBackend.BRIDGE, NETWORK.name, str(address))
    plain = Machine(uid, f"bench{number}", 1, 1, 128, KernelBoot("/kernel", "", ""))
    return replace(plain, nics=(nic,))


if __name__ == "__main__":
    measure()
