"""The Python client of the guest agent against a bare socket loop: both ask the same real agent, in turn."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bare import Agent
from vmherd.guest_agent import GuestAgent

PINGS = 4000
TURN_PINGS = 100
"""An agent hears one client at a time, so each connects anew for so many pings; the first of them are not counted."""
WARM_UP_PINGS = 5
READS = 10
READ_BYTES = 4 << 20
TIMEOUT_S = 60.0


def measure() -> None:
    """Measures both and prints it."""
    with _host_agent() as (path, big_file):
        print(f"\nGuest agent on a host socket, from Python, medians of {PINGS} pings and {READS} reads in turn")
        ping_bare_s, read_bare_s, ping_ours_s, read_ours_s = asyncio.run(_measure(path, big_file))
    ping_ratio, read_ratio = ping_ours_s / ping_bare_s, read_ours_s / read_bare_s
    print(f"  ping, bare socket      {ping_bare_s * 1e3:8.3f} ms   ratio 1.00")
    print(f"  ping, GuestAgent       {ping_ours_s * 1e3:8.3f} ms   ratio {ping_ratio:.2f} (at most 1.50)")
    print(f"  4 MiB, bare socket     {read_bare_s * 1e3:8.3f} ms   ratio 1.00")
    print(f"  4 MiB, GuestAgent      {read_ours_s * 1e3:8.3f} ms   ratio {read_ratio:.2f}")


async def _measure(path: Path, big_file: Path) -> tuple[float, ...]:
    """Gives the medians in seconds: ping and read on the bare socket, ping and read of the client."""
    bare: tuple[list[float], list[float]] = ([], [])
    ours: tuple[list[float], list[float]] = ([], [])
    for turn in range(PINGS // TURN_PINGS):
        reads = int(turn < READS)
        _ask_bare(path, big_file, reads, *bare)
        await _ask_ours(path, big_file, reads, *ours)
    return tuple(map(statistics.median, (*bare, *ours)))


def _ask_bare(path: Path, big_file: Path, reads: int, pings_s: list[float], reads_s: list[float]) -> None:
    with contextlib.closing(Agent(path)) as agent:
        for number in range(WARM_UP_PINGS + TURN_PINGS):
            start_s = time.perf_counter()
            agent.ping()
            if number >= WARM_UP_PINGS:
                pings_s.append(time.perf_counter() - start_s)
        for _ in range(reads):
            handle = agent.call("guest-file-open", path=str(big_file))
            start_s = time.perf_counter()
            agent.call("guest-file-read", handle=handle, count=READ_BYTES)
            reads_s.append(time.perf_counter() - start_s)
            agent.call("guest-file-close", handle=handle)


async def _ask_ours(path: Path, big_file: Path, reads: int, pings_s: list[float], reads_s: list[float]) -> None:
    async with GuestAgent(path) as agent:
        for number in range(WARM_UP_PINGS + TURN_PINGS):
            start_s = time.perf_counter()
            await agent.ping(timeout_s=TIMEOUT_S)
            if number >= WARM_UP_PINGS:
                pings_s.append(time.perf_counter() - start_s)
        for _ in range(reads):
            handle = await agent.execute("guest-file-open", {"path": str(big_file)}, timeout_s=TIMEOUT_S)
            start_s = time.perf_counter()
            await agent.execute("guest-file-read", {"handle": handle, "count": READ_BYTES}, timeout_s=TIMEOUT_S)
            reads_s.append(time.perf_counter() - start_s)
            await agent.execute("guest-file-close", {"handle": handle}, timeout_s=TIMEOUT_S)


@contextlib.contextmanager
def _host_agent() -> Iterator[tuple[Path, Path]]:
    """Runs a qemu-ga on a socket of this host, with a file that it can read."""
    program = shutil.which("qemu-ga", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        raise RuntimeError("qemu-ga is missing: install the package qemu-guest-agent")
    with tempfile.TemporaryDirectory(prefix="vmherd-") as folder:
        path, big_file = Path(folder) / "agent.sock", Path(folder) / "file"
        big_file.write_bytes(bytes(READ_BYTES))
        process = subprocess.Popen(
            [program, "-m", "unix-listen", "-p", path, "-t", folder, "-f", f"{folder}/pid"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield path, big_file
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    measure()
