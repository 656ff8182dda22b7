"""What this host has: QEMU, accelerators, memory. Asked anew each time, so that a QEMU installed later is noticed."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmherd.host.accelerator import Accelerator, Accelerators, Before, Measurement, as_this_user
from vmherd.model.errors import FailedPrecondition

QEMU_MINIMUM = (7, 0)
QEMU_DEFAULT = "qemu-system-x86_64"
QEMU_PACKAGE = "the package qemu-system-x86 on Debian and Ubuntu"
QEMU_ASK_DEADLINE_S = 10.0

_VERSION = re.compile(r"QEMU emulator version ((\d+)\.(\d+)\S*)")
_MACHINE_TYPE = re.compile(r"^(\S+) +\S", re.MULTILINE)


@dataclass(frozen=True)
class Qemu:
    """A QEMU that is new enough."""

    path: Path
    version: str
    machine_types: tuple[str, ...]


class Host:
    """This host, with the QEMU called `qemu_binary` and what is remembered of its accelerators in the file `cache`."""

    def __init__(
        self, qemu_binary: str, wanted: Literal["auto", "kvm", "tcg"], cache: Path, *, before: Before = as_this_user
    ) -> None:
        self._qemu_binary = qemu_binary or QEMU_DEFAULT
        self._wanted = wanted
        self._before = before
        self._accelerators = functools.cache(functools.partial(Accelerators, cache=cache, before=before))
        self.memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        self.cpus = os.sysconf("SC_NPROCESSORS_ONLN")

    async def qemu(self) -> Qemu:
        """QEMU as it is installed now.

        Raises:
            FailedPrecondition: there is none (`QEMU_MISSING`) or it is older than 7.0 (`QEMU_TOO_OLD`).
        """
        return await asyncio.to_thread(_find, tuple(self._before("tcg")), self._qemu_binary)

    async def accelerator(self, qemu: Qemu) -> Accelerator:
        """The accelerator that machines get; measured first where the settings leave it open."""
        return await self._accelerators(qemu.path).choose(self._wanted)

    async def measurements(self, qemu: Qemu) -> tuple[Measurement, ...]:
        """How each accelerator did; nothing where the settings choose, for then nobody has to know."""
        if self._wanted != "auto":
            return ()
        measured = await self._accelerators(qemu.path).measurements()
        return (measured.kvm, measured.tcg)


def _find(before: tuple[str, ...], name: str) -> Qemu:
    path = shutil.which(name)
    if path is None:
        raise _missing(f"there is no program {name}")
    status = os.stat(path)
    return _ask(before, os.path.abspath(path), (status.st_ino, status.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _ask(before: tuple[str, ...], path: str, _file: tuple[int, int]) -> Qemu:
    """What the QEMU in this very file says of itself."""
    version = _VERSION.match(_output(*before, path, "--version"))
    if version is None:
        raise _missing(f"{path} does not say that it is QEMU")
    if (int(version[2]), int(version[3])) < QEMU_MINIMUM:
        needed = ".".join(map(str, QEMU_MINIMUM))
        raise FailedPrecondition(
            f"{path} is QEMU {version[1]}, and vmherd needs {needed} or newer: {QEMU_PACKAGE}",
            reason="QEMU_TOO_OLD",
            metadata={"path": path, "version": version[1], "needed": needed},
        )
    _heading, _, machines = _output(*before, path, "-machine", "help").partition("\n")
    return Qemu(Path(path), version[1], tuple(_MACHINE_TYPE.findall(machines)))


def _output(*words: str) -> str:
    try:
        return subprocess.run(
            words,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=QEMU_ASK_DEADLINE_S,
            encoding="utf-8",
            errors="replace",
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or "").strip()
        raise _missing(f"QEMU cannot be asked for its version: {error}{said and f': {said}'}") from error


def _missing(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"{why}; install QEMU ({QEMU_PACKAGE}) or set `qemu_binary`", reason="QEMU_MISSING")
