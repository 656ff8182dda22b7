"""A gate before a herd's QEMU, to hold starts where they are under way."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator

from tests.framework.herd import HerdUnderTest

QEMU_BEHIND_A_GATE = """#!/bin/sh
flock --shared {gate} true
exec {qemu} "$@"
"""


class Gate:
    """Restarts the herd's helper with a QEMU that waits where the gate is closed."""

    def __init__(self, herd: HerdUnderTest) -> None:
        # Below the herd's own directory, which goes with it and which machines' users can be let into.
        herd.directory.chmod(0o711)
        herd.files.settings.chmod(0o711)
        self._file = herd.files.settings / "gate"
        self._file.touch(0o644)
        program = herd.files.settings / "qemu"
        program.write_text(QEMU_BEHIND_A_GATE.format(gate=self._file, qemu=shutil.which("qemu-system-x86_64")))
        program.chmod(0o755)
        herd.end("qemu")
        herd.settings("qemu", qemu_binary=str(program))
        herd.start("qemu")
        herd.wait_ready()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Holds every start of QEMU until the context is left."""
        with self._file.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
