"""Copying out of and into a guest, against the bare channel with the same chunk size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks.bare import Agent
from vmherd.api.v1.file_pb2 import ReadFileRequest, WriteFileHeader, WriteFileRequest
from vmherd.client import Client
from vmherd.guest_agent.files import CHUNK_BYTES

SIZE_BYTES = 256 << 20
MEMORY_MIB = 1024
"""The built-in guest keeps its files in memory: the one that is copied, and its new version beside it."""

PATH = "/tmp/bench"
MESSAGE_BYTES = 256 << 10


def measure(name: str, bare: Agent, client: Client, controller_memory_mib: Callable[[], float]) -> None:
    """Copies in turn through the bare channel and through vmherd, both guests being alike, and prints it."""
    idle_mib = controller_memory_mib()
    into_bare_s = _timed(lambda: bare.write_file(PATH, SIZE_BYTES, CHUNK_BYTES))
    into_s = _timed(lambda: client.files.WriteFile(_parts(name)))
    out_of_bare_s = _timed(lambda: bare.read_file(PATH, CHUNK_BYTES))
    out_of_s = _timed(lambda: _read(client, name))
    print(f"\nCopy of {SIZE_BYTES >> 20} MiB over gRPC, checked by its SHA-256, in chunks of {CHUNK_BYTES >> 10} KiB")
    for what, ours_s, bare_s in (
        ("into the guest", into_s, into_bare_s),
        ("out of the guest", out_of_s, out_of_bare_s),
    ):
        ours, theirs = (SIZE_BYTES / (1 << 20) / seconds for seconds in (ours_s, bare_s))
        print(f"  {what:<22} {ours:8.1f} MiB/s, bare channel {theirs:.1f}, ratio {ours / theirs:.2f} (at least 0.80)")
    print(f"  {'controller grew by':<22} {controller_memory_mib() - idle_mib:8.1f} MiB (at most 32)")


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def _parts(name: str) -> Iterator[WriteFileRequest]:
    yield WriteFileRequest(header=WriteFileHeader(name=name, path=PATH, size_bytes=SIZE_BYTES))
    for _ in range(0, SIZE_BYTES, MESSAGE_BYTES):
        yield WriteFileRequest(data=bytes(MESSAGE_BYTES))
    yield WriteFileRequest(end=True)


def _read(client: Client, name: str) -> None:
    size_bytes = 0
    for part in client.files.ReadFile(ReadFileRequest(name=name, path=PATH)):
        size_bytes += len(part.data)
    if size_bytes != SIZE_BYTES:
        raise RuntimeError(f"{size_bytes} bytes came out of the guest, not {SIZE_BYTES}")
