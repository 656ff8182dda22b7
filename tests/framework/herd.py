"""A herd under test: the three real processes in a directory of their own, each to be killed and started at will."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.framework.console import Console, console_at
from vmherd.cli import traces
from vmherd.cli.herd_files import Flags, prepare, settings_file
from vmherd.client import Client
from vmherd.image.registry import KernelImage
from vmherd.model.layout import Herd, RunDirectory, StateDirectory

PROCESSES = ("qemu", "controller", "gateway")
READY_TIMEOUT_S = 30.0
END_TIMEOUT_S = 30.0
BOOT_TIMEOUT_S = 60.0
"""The built-in guest answers in some 2.5 s; a busy machine with two cores may take much longer."""

AT_ONCE_S = 20.0
"""For what waits for nothing: what it must not wait for takes longer, and a busy machine is not as slow as that."""


class HerdUnderTest:
    """The three processes. `http` is a client of the gateway that shows the token, `directory` all there is."""

    def __init__(self, directory: Path, image: KernelImage) -> None:
        self.directory = directory
        self.image = image.name
        self.files = Herd(directory)
        self.state = StateDirectory(directory / "state")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = [_reserved_port() for _ in range(2)]
        self.address, self.grpc_address = (f"127.0.0.1:{port.getsockname()[1]}" for port in self._ports)
        prepare(self.files, self.state.path, Flags(http=self.address, grpc=self.grpc_address, accelerator="tcg"))
        shutil.copytree(image.kernel.parent, self.state.images / image.name)
        self.token = self.files.token.read_text().strip()
        self.http = httpx.Client(
            base_url=f"http://{self.address}",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=BOOT_TIMEOUT_S,
        )

    def add_image(self, name: str, kernel: bytes) -> None:
        """Puts an image of this kernel beside the built-in one."""
        image = self.state.images / name
        image.mkdir()
        (image / "kernel").write_bytes(kernel)
        (image / "initramfs").write_bytes(b"\0")
        description = {"version": "1", "command_line": "", "default_cpus": 1, "default_memory_mib": 32}
        (image / "image.json").write_text(json.dumps(description))

    def start(self, *names: str) -> None:
        """Starts these processes, or all three, without waiting for them."""
        for name in names or PROCESSES:
            with (self.files.logs / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "vmherd", name, "--settings", str(settings_file(self.files, name))],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def end(self, *names: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends these processes, or all three, a signal and waits until they are gone."""
        ending = names or tuple(self.processes)
        for name in ending:
            self.processes[name].send_signal(number)
        for name in ending:
            self.processes[name].wait(timeout=END_TIMEOUT_S)
            del self.processes[name]

    def restart(self, *names: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends these processes, or all three, at once and starts them again, without waiting for them."""
        self.end(*names, number=number)
        self.start(*names)

    def complete(self) -> None:
        """Starts those of the three that do not run, and waits until all are ready."""
        if ended := [name for name in PROCESSES if name not in self.processes]:
            self.start(*ended)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until an HTTP request reaches the controller and the controller reaches the helper."""
        self.eventually(lambda: self.http.get("/readyz").status_code == 200, READY_TIMEOUT_S)
        plan = {"name": "readiness-probe", "image": self.image}
        self.eventually(lambda: self.http.post("/v1/instances:plan", json=plan).status_code == 200, READY_TIMEOUT_S)

    def eventually(self, condition: Callable[[], bool], timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Waits until a condition holds; for what has no event that a test could wait for."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.TransportError):
                if condition():
                    return
            assert time.monotonic() < deadline_s, f"it did not come true within {timeout_s:g} s"
            time.sleep(0.02)

    def launch(self, name: str = "web", *, until: str = "AGENT", **fields: Any) -> dict[str, Any]:
        """Launches an instance over HTTP and waits for a rung of its readiness; "" waits for none."""
        launched = _succeeded(self.http.post("/v1/instances", json={"name": name, **fields}))
        return self.wait(name, until) if until else launched

    def ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """A request below `/v1/instances/` that must succeed."""
        response = self.http.request(method, f"/v1/instances/{path}", json=body if method == "POST" else None)
        return _succeeded(response)

    def run(self, *command: str, name: str = "web", **fields: Any) -> dict[str, Any]:
        """Runs a command in a guest."""
        return self.ask("POST", f"{name}/run", command=list(command), **fields)

    def shell(self, script: str, name: str = "web") -> str:
        """Runs a shell script in a guest that must succeed, and gives what it wrote."""
        result = self.run("sh", "-c", script, name=name)
        assert (result["exitCode"], result["stderr"]) == (0, ""), result
        return str(result["stdout"])

    def boot_id(self, name: str = "web") -> str:
        """Names one boot of a guest."""
        return self.shell("cat /proc/sys/kernel/random/boot_id", name=name)

    def wait(self, name: str = "web", until: str = "AGENT", timeout_s: float = BOOT_TIMEOUT_S) -> dict[str, Any]:
        """Waits for a condition and gives the instance as it is then."""
        lines = self.stream(f"/v1/instances/{name}/wait", timeout_s, until=until, timeout=f"{timeout_s:g}s")
        last = list(lines)[-1]
        assert "result" in last, last
        instance: dict[str, Any] = last["result"]["instance"]
        return instance

    def stream(self, path: str, quiet_s: float = BOOT_TIMEOUT_S, /, **query: Any) -> Iterator[dict[str, Any]]:
        """The messages of a stream, one by one; there is at most `quiet_s` without one."""
        with self.http.stream("GET", path, params=query, timeout=quiet_s) as response:
            for line in response.iter_lines():
                yield json.loads(line)

    def info(self, name: str = "web") -> dict[str, Any]:
        """An instance as it is now."""
        return self.ask("GET", name)

    def client(self) -> Client:
        """A gRPC client of the controller."""
        return Client(self.files.controller_socket)

    def qemu_pid(self, uid: str) -> int:
        """The process id of an instance's QEMU, as the kernel has it: its command line names the uid."""
        [pid] = self.qemu_pids_of(uid)
        return pid

    def qemu_pids_of(self, uid: str) -> list[int]:
        """The process ids of an instance's QEMUs: there should be one at most."""
        return [pid for pid in self.qemu_pids() if uid.encode() in _command_line(pid)]

    def qemu_pids(self) -> list[int]:
        """The process ids of every QEMU of this herd."""
        found = traces.processes(self.directory)
        return [pid for pid, name in found.items() if name.startswith("qemu-system")]

    def console(self, uid: str) -> str:
        """What the guest wrote to its serial console."""
        return self.state.instance(uid).console_log.read_text(errors="replace")

    @contextlib.contextmanager
    def at_console(self, name: str = "web") -> Iterator[Console]:
        """A shell in a guest that does not need its agent."""
        with console_at(RunDirectory(self.directory).instance(self.info(name)["uid"]).console) as console:
            yield console

    @contextlib.contextmanager
    def agent_coming_back(self, name: str = "web") -> Iterator[None]:
        """The agent goes in the body, and comes back in it or afterwards; this waits until vmherd has noted that.

        QEMU may tell up to a second late, and a call that is under way then ends as one of the agent that has gone.
        """
        before = self._agent_reached(name)
        yield
        self.eventually(lambda: self._agent_reached(name) not in (None, before))

    def _agent_reached(self, name: str) -> str | None:
        """When the instance reached the rung AGENT; None while it is not on it."""
        times = {step["rung"]: step["reachTime"] for step in self.info(name)["readiness"]["steps"]}
        return times.get("AGENT")

    def log(self, name: str) -> str:
        """What one of the processes wrote."""
        return (self.files.logs / f"{name}.log").read_text()

    def settings(self, name: str, **fields: Any) -> Path:
        """The settings file of one of the processes, after these fields were changed."""
        path = settings_file(self.files, name)
        if fields:
            path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return path

    def store_revision(self) -> int:
        """The store's revision: equal before and after what must store nothing."""
        with contextlib.closing(sqlite3.connect(f"{self.state.store.as_uri()}?mode=ro", uri=True)) as database:
            revision: int = database.execute("SELECT value FROM counter WHERE name = 'revision'").fetchone()[0]
            return revision

    def fingerprint(self) -> dict[str, Any]:
        """All instances and the files of their disks: equal before and after what must change nothing."""
        instances = self.http.get("/v1/instances").json()["instances"]
        files: dict[str, int] = {}
        for directory in (self.state.instances, self.directory / "instances"):
            for folder, folders, names in os.walk(directory):
                for name in {*folders, *names} - {"console.log", "stderr.log"}:
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):  # its owner may replace it while this looks
                        files[str(path.relative_to(self.directory))] = path.lstat().st_size
        return {"instances": instances, "files": files}

    def remove_instances(self) -> None:
        """Deletes every instance."""
        for instance in self.http.get("/v1/instances").json()["instances"]:
            response = self.http.delete(f"/v1/instances/{instance['name']}", params={"force": True})
            assert response.status_code == 200, response.text

    def tear_down_networks(self) -> None:
        """Removes what the helper, which has ended, made of its networks."""
        settings = settings_file(self.files, "qemu")
        command = [sys.executable, "-m", "vmherd", "qemu", "--settings", str(settings), "--teardown"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=END_TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        """Lets go of what this process holds of the herd: its connections and its ports."""
        self.http.close()
        for port in self._ports:
            port.close()


@contextlib.contextmanager
def herd_under_test(image: KernelImage, *networks: dict[str, Any]) -> Iterator[HerdUnderTest]:
    """A herd that is up and ready; afterwards its instances are gone, and it left nothing behind.

    The networks are those of the helper's settings, and are made where the calling thread is: in a namespace.
    """
    directory = Path(tempfile.mkdtemp(prefix="vmherd-"))
    herd = HerdUnderTest(directory, image)
    if networks:
        herd.settings("qemu", networks=networks)
    try:
        herd.start()
        herd.wait_ready()
        yield herd
        herd.complete()
        herd.remove_instances()
        herd.end()
        if networks:
            herd.tear_down_networks()
        assert list(traces.all_of(herd.files)) == []
        for name in PROCESSES:
            assert "Traceback" not in herd.log(name), herd.log(name)
    finally:
        herd.close()
        herd.end(number=signal.SIGKILL)
        for pid in traces.processes(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)


def reason(response: httpx.Response) -> str:
    """The reason of a request that failed: the `ErrorInfo` of its status."""
    [info] = [detail for detail in response.json()["details"] if detail["@type"].endswith("google.rpc.ErrorInfo")]
    return str(info["reason"])


def _succeeded(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def _reserved_port() -> socket.socket:
    """A free port that nobody else is given while this socket is open, and that a server can still listen on."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has ended since it was found
        return b""
