"""`make bench`: vmherd's figures as ratios to bare QEMU, medians, measured in turn in one run."""

from __future__ import annotations

import asyncio
import http.client
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bare
from vmherd.api.v1 import guest_pb2
from vmherd.cli.herd_files import Flags
from vmherd.cli.processes import Processes
from vmherd.cli.up import herd_up
from vmherd.client import Client
from vmherd.model.layout import Herd, StateDirectory

BOOTS = 7
PINGS = 500
IDLE_S = 2.0
"""The processes are left alone for so long before their memory is looked at."""


class Gateway:
    """One kept connection to the gateway."""

    def __init__(self, address: str, token: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=60)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The answer's JSON, of every line the last."""
        self._connection.request(method, path, None if body is None else json.dumps(body), self._headers)
        response = self._connection.getresponse()
        lines = response.read().splitlines()
        if response.status != http.client.OK:
            raise RuntimeError(f"{method} {path}: {lines}")
        return json.loads(lines[-1])


def main() -> None:
    """Measures everything and prints it."""
    directory = Path(tempfile.mkdtemp(prefix="vmherd-"))
    try:
        asyncio.run(_bench(Herd(directory)))
    finally:
        shutil.rmtree(directory)


async def _bench(herd: Herd) -> None:
    async with herd_up(herd, herd.path / "state", Flags(http="127.0.0.1:0", accelerator="tcg")) as (processes, _):
        await asyncio.to_thread(_measure, herd, processes)


def _measure(herd: Herd, processes: Processes) -> None:
    state = StateDirectory(herd.path / "state")
    gateway = Gateway(processes.http, herd.token.read_text().strip())
    planned = gateway.call("POST", "/v1/instances:plan", {"name": "bench"})["argv"]
    version = subprocess.run([planned[0], "--version"], capture_output=True, text=True, check=True).stdout
    print(f"{version.splitlines()[0]}, TCG; Python {platform.python_version()}; {platform.machine()}")

    def boot_bare() -> float:
        start_s = time.perf_counter()
        with bare.machine(planned, herd.path, state.path) as agent:
            agent.ping()
            return time.perf_counter() - start_s

    def boot_vmherd() -> float:
        start_s = time.perf_counter()
        gateway.call("POST", "/v1/instances", {"name": "bench"})
        last = gateway.call("GET", "/v1/instances/bench/wait?until=AGENT&timeout=60s")
        elapsed_s = time.perf_counter() - start_s
        if "error" in last:
            raise RuntimeError(last["error"])
        gateway.call("DELETE", "/v1/instances/bench?force=true")
        return elapsed_s

    boot_bare(), boot_vmherd()
    boots = [(boot_vmherd(), boot_bare()) for _ in range(BOOTS)]
    print(f"\nLaunch to first agent answer, medians of {BOOTS} in turn")
    ours_s, bare_s = (statistics.median(column) for column in zip(*boots, strict=True))
    print(f"  bare QEMU              {bare_s:8.3f} s")
    print(f"  vmherd over HTTP       {ours_s:8.3f} s    ratio {ours_s / bare_s:.2f} (at most 1.10)")

    gateway.call("POST", "/v1/instances", {"name": "bench"})
    gateway.call("GET", "/v1/instances/bench/wait?until=ADDRESS&timeout=60s")
    request = guest_pb2.GuestPingRequest(name="bench")
    with bare.machine(planned, herd.path, state.path) as agent, Client(herd.controller_socket) as client:
        agent.ping()
        pings = _in_turn(
            agent.ping,
            lambda: client.guest.Ping(request),
            lambda: gateway.call("GET", "/v1/instances/bench/guest/ping"),
        )
    print(f"\nGuest agent ping, medians of {PINGS} in turn")
    for name, ping_s in zip(("bare socket", "vmherd over gRPC", "vmherd over HTTP"), pings, strict=True):
        print(f"  {name:<22} {ping_s * 1e3:8.3f} ms   ratio {ping_s / pings[0]:.2f}")
    gateway.call("DELETE", "/v1/instances/bench?force=true")

    time.sleep(IDLE_S)
    print("\nResident memory, idle")
    for child in processes.children:
        print(f"  {child.name:<22} {_resident_mib(child.process.pid):8.1f} MiB (at most 70)")


def _in_turn(*calls: Callable[[], object]) -> list[float]:
    """The median time of each call in seconds, with all of them made in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(PINGS):
        for index, call in enumerate(calls):
            start_s = time.perf_counter()
            call()
            times[index].append(time.perf_counter() - start_s)
    return [statistics.median(column) for column in times]


def _resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} is gone")


if __name__ == "__main__":
    sys.exit(main())
