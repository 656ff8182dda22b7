"""Three processes of three users: the helper is root, the controller and the gateway are not, and each has its own."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.framework.herd import HerdUnderTest
from vmherd.cli import traces
from vmherd.cli.herd_files import settings_file
from vmherd.image.registry import KernelImage

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has users to give")

USERS = {"qemu": 0, "controller": 64801, "gateway": 64802}
CLIENTS = 64803
"""The group that may connect to the controller."""
END_TIMEOUT_S = 30.0
REACHABLE = """
set -e
mount --bind "$1" /mnt
mount -t tmpfs -o mode=755 none "$2"
mkdir -p "$1"
mount --move /mnt "$1"
shift 2
exec "$@"
"""
"""Shows a directory to all users, in a mount namespace of the process's own, though one on the way to it is closed."""


def as_user(user: int) -> list[str]:
    """The words that make a command another user's, who can execute this Python wherever it is."""
    python = Path(sys.base_prefix)
    closed = [str(path) for path in reversed((python, *python.parents)) if not path.stat().st_mode & stat.S_IXOTH]
    reach = ["unshare", "--mount", "sh", "-c", REACHABLE, "sh", str(python), closed[0]] if closed else []
    return [*reach, "setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={CLIENTS}", "--inh-caps=-all", "--"]


class HerdOfThreeUsers(HerdUnderTest):
    """A herd whose processes have directories as an installation gives them."""

    def __init__(self, directory: Path, image: KernelImage) -> None:
        super().__init__(directory, image)
        self.run_dir, self.own_dir = directory / "vmherd-qemu", directory / "vmherd"
        shutil.move(self.state.path, directory / "lib")
        self.state = type(self.state)(directory / "lib")
        self.settings(
            "qemu",
            listen=str(self.run_dir / "qemu.sock"),
            run_dir=str(self.run_dir),
            state_dir=str(self.state.path),
            controller_user=str(USERS["controller"]),
        )
        self.settings(
            "controller",
            listen=str(self.own_dir / "controller.sock"),
            qemu=str(self.run_dir / "qemu.sock"),
            run_dir=str(self.run_dir),
            state_dir=str(self.state.path),
            socket_group=str(CLIENTS),
        )
        self.settings("gateway", controller=str(self.own_dir / "controller.sock"))
        controller = USERS["controller"]
        for path, user, group, mode in (
            (directory, 0, 0, 0o755),
            (self.files.settings, 0, 0, 0o755),
            (self.files.logs, 0, 0, 0o755),
            (self.files.token, 0, CLIENTS, 0o640),
            (self.run_dir, 0, controller, 0o750),
            (self.own_dir, controller, CLIENTS, 0o750),
            *((path, controller, controller, 0o750) for path in (self.state.path, *self.state.path.rglob("*"))),
        ):
            if not path.exists():
                path.mkdir()
            os.chown(path, user, group)
            path.chmod(mode)

    def start(self, *names: str) -> None:
        """Starts these processes, or all three, each as its user."""
        for name in names or USERS:
            with (self.files.logs / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [
                        *(as_user(USERS[name]) if USERS[name] else ()),
                        *(sys.executable, "-m", "vmherd", name, "--settings", str(settings_file(self.files, name))),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )


@pytest.fixture
def herd(builtin_image: KernelImage) -> Iterator[HerdOfThreeUsers]:
    directory = Path(tempfile.mkdtemp(prefix="vmherd-"))
    it = HerdOfThreeUsers(directory, builtin_image)
    try:
        it.start()
        it.wait_ready()
        yield it
        it.remove_instances()
        it.end()
        assert list(traces.processes(directory)) == []
        assert sorted(path.name for path in it.run_dir.rglob("*")) == ["instances"]
        assert list(it.own_dir.iterdir()) == []
        assert list(it.state.instances.iterdir()) == []
    finally:
        it.close()
        it.end(number=signal.SIGKILL)
        for pid in it.qemu_pids():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)


def test_an_instance_lives_its_life_though_only_the_helper_is_root(herd: HerdOfThreeUsers) -> None:
    web = herd.launch("web", until="ADDRESS")
    uid = web["uid"]
    pid = herd.qemu_pid(uid)
    machine = Path(f"/proc/{pid}").stat().st_uid
    assert machine not in USERS.values()
    for name, user in USERS.items():
        assert Path(f"/proc/{herd.processes[name].pid}").stat().st_uid == user
    own = herd.state.instance(uid)
    for path, mode in ((own.path, 0o770), (own.disk, 0o660), (own.console_log, 0o660)):
        status = path.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (machine, USERS["controller"], mode)

    assert herd.shell("echo hello") == "hello\n"
    herd.restart("qemu", "controller", number=signal.SIGKILL)
    herd.wait_ready()
    assert herd.shell("echo still here") == "still here\n"
    assert herd.qemu_pid(uid) == pid
    herd.ask("POST", "web/stop")
    herd.ask("POST", "web/start")
    herd.wait("web", "AGENT")
    assert Path(f"/proc/{herd.qemu_pid(uid)}").stat().st_uid == machine


def test_a_client_gets_to_the_controller_and_no_further(herd: HerdOfThreeUsers) -> None:
    herd.launch("web", until="QMP")
    uid = herd.info("web")["uid"]
    sockets = [
        *(herd.run_dir / "qemu.sock", herd.own_dir / "controller.sock"),
        *(herd.run_dir / "instances" / uid / name for name in ("qmp.sock", "agent.sock", "console.sock")),
    ]
    script = (
        "import socket, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        socket.socket(socket.AF_UNIX).connect(path)\n"
        "        print('let in')\n"
        "    except PermissionError:\n"
        "        print('refused')\n"
    )
    said = subprocess.run(
        [*as_user(64804), sys.executable, "-c", script, *map(str, sockets)],
        capture_output=True,
        text=True,
        timeout=END_TIMEOUT_S,
        check=True,
    )
    assert said.stdout.splitlines() == ["refused", "let in", "refused", "refused", "refused"]
    with httpx.Client(base_url=f"http://{herd.address}") as stranger:
        assert stranger.get("/v1/instances").status_code == 401
