"""A VM with nothing of vmherd around it: QEMU's own command line, and JSON on its sockets."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.framework.console import TIMEOUT_S, Console
from vmherd.image.registry import KernelImage


class BareVm:
    """A running VM, its agent connected, and everything that its console says."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self.process = process
        self.agent = _connect(directory / "agent", process)
        self.console = Console(_connect(directory / "console", process))
        self.qmp = _connect(directory / "qmp", process)
        self._agent_lines = self.agent.makefile("rb")
        self._qmp_lines = self.qmp.makefile("rb")
        self._closing = (self._agent_lines, self._qmp_lines, self.agent, self.console, self.qmp)
        json.loads(self._qmp_lines.readline())
        self.monitor("qmp_capabilities")

    def close(self) -> None:
        """Closes the connections."""
        for closing in self._closing:
            closing.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """What the agent answers. Before it listens, the question waits for it."""
        self.send(command, **arguments)
        answer = json.loads(self._agent_lines.readline())
        assert "return" in answer, answer
        return answer["return"]

    def send(self, command: str, **arguments: Any) -> None:
        """Asks the agent something that has no answer."""
        self.agent.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def run(self, script: str) -> str:
        """What a shell in the guest prints for a script."""
        words = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}
        pid = self.ask("guest-exec", **words)["pid"]
        deadline = time.monotonic() + TIMEOUT_S
        while not (status := self.ask("guest-exec-status", pid=pid))["exited"]:
            assert time.monotonic() < deadline, f"{script!r} does not end"
        assert status["exitcode"] == 0, status
        return base64.b64decode(status.get("out-data", "")).decode()

    def monitor(self, command: str, **arguments: Any) -> None:
        """Gives QEMU a command."""
        self.qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._qmp_message(lambda message: "return" in message)

    def event(self, name: str) -> dict[str, Any]:
        """The data of QEMU's next event of this name."""
        data = self._qmp_message(lambda message: message.get("event") == name).get("data", {})
        assert isinstance(data, dict)
        return data

    def _qmp_message(self, wanted: Any) -> dict[str, Any]:
        while True:
            message: dict[str, Any] = json.loads(self._qmp_lines.readline())
            assert "error" not in message, message
            if wanted(message):
                return message


@contextmanager
def bare_vm(image: KernelImage, *, parameters: str = "", paused: bool = False) -> Iterator[BareVm]:
    """Boots an image on the smallest machine that it promises to run on; afterwards nothing is left of it."""
    directory = Path(tempfile.mkdtemp(prefix="vm-"))
    sockets = {name: f"socket,id={name},path={directory}/{name},server=on,wait=off" for name in ("agent", "console")}
    process = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "128"),
            *("-nodefaults", "-no-user-config", "-display", "none", *(("-S",) if paused else ())),
            *("-kernel", image.kernel, "-initrd", image.initramfs),
            *("-append", f"{image.command_line} {parameters}"),
            *("-chardev", sockets["agent"], "-device", "virtio-serial"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            *("-chardev", sockets["console"], "-serial", "chardev:console"),
            *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="),
            *("-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
        ],
        env={**os.environ, "TMPDIR": str(directory)},
    )
    try:
        vm = BareVm(process, directory)
        try:
            yield vm
        finally:
            vm.close()
    finally:
        process.kill()
        process.wait(timeout=TIMEOUT_S)
        shutil.rmtree(directory)


def _connect(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    deadline = time.monotonic() + TIMEOUT_S
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    while True:
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            assert process.poll() is None, "QEMU did not start"
            assert time.monotonic() < deadline, f"QEMU does not listen on {path}"
        else:
            return connection
