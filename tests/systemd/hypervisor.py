"""The Debian guest in which vmherd's package is installed, as the tests see it: shells of root's and of a user's."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.framework.debian_guest import BOOT_TIMEOUT_S, USER
from tests.framework.herd import HerdUnderTest

COMMAND_TIMEOUT_S = 300.0
LAUNCH_TIMEOUT_S = 1200.0
"""QEMU emulates a machine that emulates a machine."""

SERVICES = ("vmherd-qemu", "vmherd-controller", "vmherd-gateway")


class Hypervisor:
    """The guest `web` of a herd. Everything that is asked of it is printed with its answer, for packaging/README.md."""

    def __init__(self, herd: HerdUnderTest) -> None:
        self._herd = herd
        self._uids: dict[str, str] = {}

    def copy_in(self, source: Path, target: str) -> None:
        """Copies a file into the guest."""
        self._vmherd("cp", str(source), f"web:{target}")

    def shell(self, script: str, *, user: str = "root") -> str:
        """Runs a script that must succeed, and gives what it wrote."""
        code, output = self.outcome(script, user=user)
        assert code == 0, output
        return output

    def outcome(self, script: str, *, user: str = "root") -> tuple[int, str]:
        """Runs a script, and gives its exit code and what it wrote to both streams."""
        started_s = time.monotonic()
        # A session of its own, so that groups are those of the moment.
        words = f"runuser -u {user} -- sh -c {shlex.quote(f'cd; exec 2>&1; {script}')}"
        done = self._vmherd("exec", "web", "--", "sh", "-c", words, check=False)
        print(f"{'#' if user == 'root' else '$'} {script}    [{time.monotonic() - started_s:.1f} s]")
        print(done.stdout.rstrip("\n"), flush=True)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout

    def vmherd(self, words: str, *, user: str = USER) -> str:
        """Runs a command of the guest's own vmherd that must succeed, as a user who may."""
        return self.shell(f"vmherd {words}", user=user)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A request below `/v1/instances` that must succeed: `vmherd` says the same, and starts for seconds here."""
        data = f"--json '{json.dumps(body)}'" if body is not None else ""
        answer: dict[str, Any] = json.loads(
            self.shell(
                f"curl --silent --show-error --fail-with-body --retry 10 --retry-delay 1 --request {method} {data} "
                '--header "Authorization: Bearer $(cat /etc/vmherd/token)" '
                f"http://127.0.0.1:8080/v1/instances{path}",
                user=USER,
            )
        )
        return answer

    def instance(self, name: str) -> dict[str, Any]:
        """One of the guest's own instances, as its vmherd has it."""
        return self.ask("GET", f"/{name}")

    def run(self, name: str, *command: str) -> str:
        """Runs a command that must succeed in one of the guest's own instances."""
        result = self.ask("POST", f"/{name}/run", {"command": command, "timeout": "60s"})
        assert result["exitCode"] == 0, result
        return str(result["stdout"])

    def uid(self, name: str) -> str:
        """An instance's uid, which never changes."""
        if name not in self._uids:
            self._uids[name] = self.instance(name)["uid"]
        return self._uids[name]

    def qemu_pid(self, name: str) -> int:
        """The process id of an instance's QEMU: its command line names the uid."""
        [pid] = self.shell(f"pgrep --full '[q]emu-system-x86_64.*{self.uid(name)}'").split()
        return int(pid)

    def life(self, name: str) -> tuple[int, str]:
        """What changes when an instance does not live on: its QEMU's pid and its guest's boot id."""
        return self.qemu_pid(name), self.run(name, "cat", "/proc/sys/kernel/random/boot_id").strip()

    def reboot(self) -> None:
        """Reboots the guest, and waits until all its services have started."""
        before = self._herd.boot_id()
        self.shell("systemd-run --quiet --on-active=1s systemctl reboot")  # not to end with the agent
        self.eventually(lambda: self._herd.boot_id() != before, BOOT_TIMEOUT_S)
        self.outcome("systemctl is-system-running --wait")

    def eventually(self, condition: Callable[[], bool], timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Waits until a condition holds; as long as the guest cannot be asked it does not."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if condition():
                    return
            except AssertionError:
                if time.monotonic() > deadline_s:
                    raise
            assert time.monotonic() < deadline_s, f"it did not come true within {timeout_s:g} s"
            time.sleep(1)

    def _vmherd(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "vmherd", "--rundir", str(self._herd.directory), *words],
            env=os.environ | {"PYTHONWARNINGS": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LAUNCH_TIMEOUT_S + COMMAND_TIMEOUT_S,
            check=check,
        )
