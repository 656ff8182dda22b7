"""Which accelerator machines get: measured on this host, not assumed.

`/dev/kvm` may exist and yet run a kernel many times slower than QEMU's own emulation (TCG), or make QEMU abort;
nested virtualisation does both. So a small guest that does what a kernel does (`accelerator_probe.S`) is timed
under each, once for each host and QEMU, and the result is kept in a file. Delete the file to measure again.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

Accelerator = Literal["kvm", "tcg"]
Identity = dict[str, str | int]
Before = Callable[[Accelerator], Sequence[str]]
"""The words to put before QEMU's, so that it runs as somebody who can do no harm."""

CPU_MODEL = "max"
"""Machines get the same, so that a CPU feature which breaks this host's KVM shows here and not in a machine."""

KVM_DEVICE = Path("/dev/kvm")
PROBE = Path(__file__).with_name("accelerator_probe.bin")
PROBE_STATUS = (0x2A << 1) | 1  # what isa-debug-exit makes of FINISHED in accelerator_probe.S

DEADLINE_S = 20.0
"""For each accelerator, which needs a fraction of a second, and many on a busy host that is itself a guest."""

KVM_PATIENCE = 3  # times TCG's time, then KVM is given up: it can no longer win
REAP_DEADLINE_S = 10.0
DETAIL_MAX_BYTES = 500
CACHE_MAX_BYTES = 65_536

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """How an accelerator did: its time in seconds, or None and the reason why it is not usable."""

    accelerator: Accelerator
    elapsed_s: float | None
    detail: str = ""

    @property
    def usable(self) -> bool:
        """Whether it finished the measured work."""
        return self.elapsed_s is not None


@dataclass(frozen=True)
class Measurements:
    """How the accelerators of a host did with the same work."""

    kvm: Measurement
    tcg: Measurement

    @property
    def faster(self) -> Accelerator:
        """KVM if it was usable and not slower than TCG, which asks nothing of the host and so is the way out."""
        if self.kvm.elapsed_s is None:
            return "tcg"
        return "kvm" if self.kvm.elapsed_s <= (self.tcg.elapsed_s or math.inf) else "tcg"


def as_this_user(_accelerator: Accelerator) -> tuple[str, ...]:
    """Nothing: QEMU runs as whoever asks."""
    return ()


class Accelerators:
    """The accelerators of this host, measured when first asked for and remembered in the file `cache`.

    `qemu_binary` is an absolute path. `deadline_s` holds for each accelerator.
    """

    def __init__(
        self, qemu_binary: Path, cache: Path, *, before: Before = as_this_user, deadline_s: float = DEADLINE_S
    ) -> None:
        self._qemu_binary = qemu_binary
        self._cache = cache
        self._before = before
        self._deadline_s = deadline_s
        self._lock = asyncio.Lock()  # callers at the same time share one measurement
        self._known: tuple[Identity, Measurements] | None = None

    async def choose(self, wanted: Literal["auto", "kvm", "tcg"]) -> Accelerator:
        """What `wanted` stands for; only `auto` looks at measurements. Raises what `measurements` raises."""
        return (await self.measurements()).faster if wanted == "auto" else wanted

    async def measurements(self) -> Measurements:
        """What was measured on this host with this QEMU, now or earlier.

        Raises OSError if QEMU cannot be executed.
        """
        async with self._lock:
            identity = _identity(self._qemu_binary)
            if self._known is not None and self._known[0] == identity:
                return self._known[1]
            found = _recall(self._cache, identity)
            if found is None:
                found = await self._measure()
                if not found.tcg.usable:  # QEMU itself is broken, or the host too busy: ask again next time
                    return found
                _remember(self._cache, identity, found)
            self._known = identity, found
            return found

    async def _measure(self) -> Measurements:
        # TCG goes first and pays for reading QEMU from a cold disk, so that a healthy KVM cannot lose by it.
        tcg = await self._measured("tcg", self._deadline_s)
        kvm = await self._measured("kvm", min(self._deadline_s, KVM_PATIENCE * (tcg.elapsed_s or math.inf)))
        log.info("measured %s and %s", tcg, kvm)
        return Measurements(kvm, tcg)

    async def _measured(self, accelerator: Accelerator, deadline_s: float) -> Measurement:
        before = self._before(accelerator)
        return await measure(self._qemu_binary, accelerator, before=before, deadline_s=deadline_s)


async def measure(
    qemu_binary: Path, accelerator: Accelerator, *, before: Sequence[str] = (), deadline_s: float
) -> Measurement:
    """Times the probe under one accelerator, from QEMU's start to its end.

    Raises OSError if QEMU cannot be executed.
    """
    if accelerator == "kvm" and (refusal := _kvm_refusal()):
        return Measurement(accelerator, None, refusal)
    # QEMU may abort: its core file goes where it is thrown away.
    with _probe() as probe, tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile(dir=scratch) as stderr:
        started_s = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *(*before, *_argv(qemu_binary, accelerator, probe)),
            pass_fds=(probe,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
            cwd=scratch,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(deadline_s):
                status = await process.wait()
        except TimeoutError:
            return Measurement(accelerator, None, f"not finished after {deadline_s:.2f} s")
        finally:
            await _end(process)
        if status == PROBE_STATUS:
            return Measurement(accelerator, time.monotonic() - started_s)
        return Measurement(accelerator, None, _failure(status, stderr))


@contextmanager
def _probe() -> Iterator[int]:
    """The probe in memory, where any user may read it, wherever vmherd is installed."""
    with open(os.memfd_create("probe"), "wb", buffering=0) as file:
        file.write(PROBE.read_bytes())
        yield file.fileno()


def _argv(qemu_binary: Path, accelerator: Accelerator, probe: int) -> list[str]:
    return [
        *(str(qemu_binary), "-name", "vmherd-accelerator-probe"),
        *("-machine", "q35", "-accel", accelerator, "-cpu", CPU_MODEL, "-m", "32M"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-kernel", f"/proc/self/fd/{probe}"),
    ]


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.kill()
    try:
        async with asyncio.timeout(REAP_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        log.error("QEMU, process %d, is still there %g s after SIGKILL", process.pid, REAP_DEADLINE_S)


def _failure(status: int, stderr: IO[bytes]) -> str:
    end = f"died of signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exited with status {status}"
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - DETAIL_MAX_BYTES))
    return ": ".join(["QEMU " + end, *stderr.read().decode(errors="replace").splitlines()])


def _kvm_refusal() -> str:
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{KVM_DEVICE}: {error.strerror}"
    return ""


def _identity(qemu_binary: Path) -> Identity:
    """What the measurements depend on; a change in any of it asks for new ones."""
    binary = qemu_binary.stat()
    with Path("/proc/cpuinfo").open() as cpuinfo:
        first_cpu = list(itertools.takewhile(str.strip, cpuinfo))
    # The flags tell bare metal from a virtual machine, whose image may have moved from one to the other.
    cpu = [line.strip() for line in first_cpu if line.startswith(("model name", "flags"))]
    machine_id = Path("/etc/machine-id")
    return {
        "machine_id": machine_id.read_text().strip() if machine_id.exists() else "",
        "kernel": platform.release(),
        "cpu": "\n".join(cpu),
        "kvm": _kvm_refusal(),
        "qemu": str(qemu_binary),
        "qemu_bytes": binary.st_size,
        "qemu_changed_ns": max(binary.st_mtime_ns, binary.st_ctime_ns),
        "probe_sha256": hashlib.sha256(PROBE.read_bytes()).hexdigest(),
    }


def _recall(cache: Path, identity: Identity) -> Measurements | None:
    """What the file says, if it is this process's user's own, well-formed and about the same host and QEMU."""
    try:
        with open(cache, "rb", opener=_open_plain) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise ValueError("not a file of this user")
            stored = json.loads(file.read(CACHE_MAX_BYTES))
        if stored["identity"] != identity:
            return None
        kvm, tcg = (_checked(name, stored["measurements"][name]) for name in ("kvm", "tcg"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("%s is ignored and will be written anew: %r", cache, error)
        return None
    return Measurements(kvm, tcg)


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # opening a FIFO would wait for a writer


def _checked(accelerator: Accelerator, stored: object) -> Measurement:
    match stored:
        case {"elapsed_s": None | float() as elapsed_s, "detail": str(detail)} if elapsed_s is None or elapsed_s > 0:
            return Measurement(accelerator, elapsed_s, detail)
    raise ValueError(f"not a measurement: {stored!r}")


def _remember(cache: Path, identity: Identity, found: Measurements) -> None:
    """Writes the file in one step, also over a link or a foreign file, and goes on without it if it cannot."""
    text = json.dumps({"identity": identity, "measurements": asdict(found)}, indent=2)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=cache.parent, prefix=cache.name)
        try:
            with open(descriptor, "w") as file:
                file.write(text)
            os.replace(temporary, cache)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        log.warning("what was measured is forgotten when this process ends: %s", error)
