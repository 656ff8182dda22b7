"""`make bench`: vmherd's figures as ratios to bare QEMU, medians, measured in turn in one run."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks import agent as agent_client
from benchmarks import bare, copy, libvirt_peer, network
from vmherd.api.v1 import guest_pb2, process_pb2
from vmherd.cli.herd_files import Flags
from vmherd.cli.processes import Processes
from vmherd.cli.up import herd_up
from vmherd.client import Client
from vmherd.image.registry import ImageRegistry
from vmherd.model.layout import Herd, StateDirectory

BOOTS = 7
PINGS = 500
RUNS = 100
PROGRAM = ("/bin/true",)
MEMORY_MAX_MIB = {"qemu": 60, "controller": 70, "gateway": 70}
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

    def close(self) -> None:
        """Closes the connection; the next call makes a new one. The gateway closes one that was idle for 5 s."""
        self._connection.close()


def main() -> None:
    """Measures everything and prints it."""
    agent_client.measure()
    network.measure()
    directory = Path(tempfile.mkdtemp(prefix="vmherd-"))
    try:
        asyncio.run(_bench(Herd(directory)))
    finally:
        shutil.rmtree(directory)


async def _bench(herd: Herd) -> None:
    async with herd_up(herd, herd.path / "state", Flags(http="127.0.0.1:0", accelerator="tcg")) as (processes, _):
        gateway = Gateway(processes.http, herd.token.read_text().strip())
        try:
            await asyncio.to_thread(_measure, herd, processes, gateway)
        finally:
            gateway.close()
            for instance in gateway.call("GET", "/v1/instances")["instances"]:
                gateway.call("DELETE", f"/v1/instances/{instance['name']}?force=true")


def _measure(herd: Herd, processes: Processes, gateway: Gateway) -> None:
    image = ImageRegistry(StateDirectory(herd.path / "state").images).get("builtin")
    planned = gateway.call("POST", "/v1/instances:plan", {"name": "bench"})["argv"]
    version = subprocess.run([planned[0], "--version"], capture_output=True, text=True, check=True).stdout
    print(f"{version.splitlines()[0]}, TCG; Python {platform.python_version()}; {platform.machine()}")

    def boot_bare() -> float:
        start_s = time.perf_counter()
        with bare.machine(planned, image) as agent:
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

    time.sleep(IDLE_S)
    print("\nResident memory, idle")
    for child in processes.children:
        print(f"  {child.name:<22} {_resident_mib(child.process.pid):8.1f} MiB (at most {MEMORY_MAX_MIB[child.name]})")

    controller_pid = next(child.process.pid for child in processes.children if child.name == "controller")
    hardware = {"hardware": {"memoryMib": copy.MEMORY_MIB}}
    gateway.call("POST", "/v1/instances", {"name": "bench", **hardware})
    gateway.call("GET", "/v1/instances/bench/wait?until=ADDRESS&timeout=60s")
    planned = gateway.call("POST", "/v1/instances:plan", {"name": "bare", **hardware})["argv"]
    with bare.machine(planned, image) as agent, Client(herd.controller_socket) as client:
        agent.ping()
        _measure_pings(agent, client, gateway, libvirt_peer.pings(image, copy.MEMORY_MIB))
        _measure_runs(agent, client)
        copy.measure("bench", agent, client, lambda: _resident_mib(controller_pid))


def _measure_pings(
    agent: bare.Agent, client: Client, gateway: Gateway, libvirt: AbstractContextManager[Callable[[], float]]
) -> None:
    request = guest_pb2.GuestPingRequest(name="bench")
    calls = {
        "bare socket": _timed(agent.ping),
        "vmherd over gRPC": _timed(lambda: client.guest.Ping(request)),
        "vmherd over HTTP": _timed(lambda: gateway.call("GET", "/v1/instances/bench/guest/ping")),
    }
    with contextlib.ExitStack() as stack:
        if why := libvirt_peer.missing():
            print(f"\nlibvirt is not measured: {why}")
        else:
            calls["python-libvirt"] = stack.enter_context(libvirt)
        gateway.close()
        print(f"\nGuest agent ping, medians of {PINGS} in turn")
        medians_s = _print_in_turn(PINGS, calls)
    if "python-libvirt" in medians_s:
        ratio = medians_s["vmherd over gRPC"] / medians_s["python-libvirt"]
        print(f"  vmherd over gRPC to python-libvirt: ratio {ratio:.2f} (at most 1.00)")


def _measure_runs(agent: bare.Agent, client: Client) -> None:
    request = process_pb2.RunRequest(name="bench", command=PROGRAM)
    print(f"\nexec {' '.join(PROGRAM)}, from request to exit code, medians of {RUNS} in turn")
    calls = {
        "bare socket": lambda: agent.run(*PROGRAM),
        "vmherd over gRPC": lambda: client.processes.Run(request),
        "its output as it comes": lambda: list(client.processes.RunStream(request)),
    }
    _print_in_turn(RUNS, {name: _timed(call) for name, call in calls.items()})


def _timed(call: Callable[[], object]) -> Callable[[], float]:
    """The same call, which gives the seconds that it took."""

    def timed() -> float:
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s

    return timed


def _print_in_turn(rounds: int, calls: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Makes the calls in turn, prints the median time of each and its ratio to the first, and gives the medians."""
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times_s[name].append(call())
    medians_s = {name: statistics.median(column) for name, column in times_s.items()}
    first_s = next(iter(medians_s.values()))
    for name, median_s in medians_s.items():
        print(f"  {name:<22} {median_s * 1e3:8.3f} ms   ratio {median_s / first_s:.2f}")
    return medians_s


def _resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} is gone")


if __name__ == "__main__":
    sys.exit(main())
