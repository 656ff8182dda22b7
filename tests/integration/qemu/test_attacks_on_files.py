"""What a controller that is not to be trusted gets the helper to open: nothing but a machine's own plain files."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import stat
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.qemu.attacked import ROOT, SECRET, STRANGER, Attacked, attacked
from vmherd.api.qemu.v1 import qemu_pb2
from vmherd.model.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from vmherd.rpc.status import from_rpc_error

pytestmark = pytest.mark.anyio

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for all tests here, so that they share one helper."""
    return "asyncio"


@pytest.fixture(scope="module")
async def site() -> AsyncIterator[Attacked]:
    async with attacked() as it:
        yield it


@pytest.fixture
def machine(site: Attacked) -> Iterator[qemu_pb2.Machine]:
    """A good machine, which each test spoils in its own way."""
    machine = site.machine()
    own = site.house.state.instance(machine.uid).path
    shutil.copy(site.house.kernel, own / "kernel")
    (own / "initramfs").write_bytes(b"\0")
    machine.kernel_boot.kernel = str(own / "kernel")
    machine.kernel_boot.initramfs = str(own / "initramfs")
    site.give(own / "kernel", own / "initramfs")
    yield machine
    site.forget(machine)


FILES: dict[str, tuple[str, Callable[[qemu_pb2.Machine], str]]] = {
    "kernel": ("kernel_boot.kernel", lambda machine: machine.kernel_boot.kernel),
    "initramfs": ("kernel_boot.initramfs", lambda machine: machine.kernel_boot.initramfs),
    "disk": ("disks[0].path", lambda machine: machine.disks[0].path),
    "console log": ("console_log", lambda machine: str(Path(machine.disks[0].path).with_name("console.log"))),
}
"""What a machine's files are called in errors, and where they are."""

each_file = pytest.mark.parametrize("file", FILES)


@pytest.fixture
def spoiled(machine: qemu_pb2.Machine, file: str) -> tuple[str, Path]:
    """One of the machine's files, which is gone, and what it is called in errors."""
    field, path_of = FILES[file]
    path = Path(path_of(machine))
    path.unlink(missing_ok=True)
    return field, path


def _write(path: str, contents: bytes) -> None:
    Path(path).write_bytes(contents)


async def refused(site: Attacked, machine: qemu_pb2.Machine, field: str, why: str) -> None:
    error = await site.refuses(machine)
    assert (type(error), error.reason) == (PermissionDenied, "PATH_REFUSED")
    assert error.message.startswith(f"{field}: ")
    assert why in error.message
    assert site.secret.read_bytes() == SECRET


@each_file
@pytest.mark.parametrize("target", ["outside", "inside", "nowhere", "itself", "/dev/zero", "/proc/self/mem"])
async def test_a_symbolic_link(
    site: Attacked, machine: qemu_pb2.Machine, spoiled: tuple[str, Path], target: str
) -> None:
    field, path = spoiled
    inside = path.with_name("another")
    inside.write_bytes(SECRET)
    targets = {"outside": str(site.secret), "inside": inside.name, "nowhere": "nowhere", "itself": path.name}
    path.symlink_to(targets.get(target, target))
    site.give(path, inside)
    await refused(site, machine, field, "is a symbolic link")


@each_file
async def test_a_hard_link(site: Attacked, machine: qemu_pb2.Machine, spoiled: tuple[str, Path]) -> None:
    field, path = spoiled
    path.hardlink_to(site.secret)
    await refused(site, machine, field, "has 2 hard links")


@each_file
@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "device"])
async def test_what_is_no_regular_file(
    site: Attacked, machine: qemu_pb2.Machine, spoiled: tuple[str, Path], kind: str
) -> None:
    field, path = spoiled
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "device":
            try:
                os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
            except PermissionError:
                pytest.skip("this user may not make devices")
    site.give(path)
    await refused(site, machine, field, "is not a regular file")


@each_file
@pytest.mark.skipif(not ROOT, reason="only root can give files away")
async def test_a_file_of_somebody_else(site: Attacked, machine: qemu_pb2.Machine, spoiled: tuple[str, Path]) -> None:
    field, path = spoiled
    path.write_bytes(SECRET)
    os.chown(path, STRANGER, STRANGER)
    await refused(site, machine, field, f"belongs to user {STRANGER}")


@pytest.mark.skipif(not ROOT, reason="only root can give files away")
async def test_a_directory_of_somebody_else(site: Attacked, machine: qemu_pb2.Machine) -> None:
    os.chown(site.house.state.instance(machine.uid).path, STRANGER, STRANGER)
    await refused(site, machine, "uid", f"belongs to user {STRANGER}")


@pytest.mark.parametrize("file", ["kernel", "initramfs", "disk"])
async def test_a_file_that_is_not_there(site: Attacked, machine: qemu_pb2.Machine, spoiled: tuple[str, Path]) -> None:
    error = await site.refuses(machine)
    assert (type(error), error.reason) == (FailedPrecondition, "FILE_MISSING")


@pytest.mark.parametrize("level", ["instances", "images", "own", "below"])
async def test_a_directory_that_is_a_link(site: Attacked, machine: qemu_pb2.Machine, level: str) -> None:
    """What the link leads to looks right in every other way."""
    state = site.house.state
    below = state.instance(machine.uid).path / "below"
    below.mkdir()
    shutil.copy(machine.disks[0].path, below / "disk.raw")
    site.give(below, below / "disk.raw")
    directory, field = {
        "instances": (state.instances, "uid"),
        "images": (state.images, "kernel_boot.kernel"),
        "own": (state.instance(machine.uid).path, "uid"),
        "below": (below, "disks[0].path"),
    }[level]
    if level == "images":
        machine.kernel_boot.kernel = str(site.house.kernel)
    if level == "below":
        machine.disks[0].path = str(below / "disk.raw")
    elsewhere = site.outside / "elsewhere"
    directory.rename(elsewhere)
    directory.symlink_to(elsewhere)
    try:
        await refused(site, machine, field, "cannot be opened without following a link")
    finally:
        directory.unlink()
        elsewhere.rename(directory)


def leading_elsewhere(site: Attacked, machine: qemu_pb2.Machine) -> dict[str, str]:
    """Paths that the helper must take for what they are."""
    state, other = site.house.state, site.machine()
    own = state.instance(machine.uid).path
    return {
        "outside": "/etc/passwd",
        "of a device": "/dev/zero",
        "of a process": "/proc/self/mem",
        "of a descriptor": "/proc/self/fd/3",
        "of a descriptor of QEMU's": "/dev/fdset/3",
        "the secret": str(site.secret),
        "the store": str(state.store),
        "the state directory": str(state.path),
        "the instances": str(state.instances),
        "another machine's disk": other.disks[0].path,
        "another machine's console": str(Path(other.disks[0].path).with_name("console.log")),
        "of the same beginning": f"{own}-and-more/disk.raw",
        "upwards": f"{own}/../../outside/secret",
        "upwards and back": f"{own}/../{machine.uid}/disk.raw",
        "in place": f"{own}/./disk.raw",
        "doubled": f"{own}//disk.raw",
        "with an end": f"{own}/disk.raw/",
        "relative": "disk.raw",
        "none": "",
        "the root": "/",
        "with a comma": f"{own}/disk.raw,readonly=off",
        "with a space": f"{own}/disk raw",
        "with a newline": f"{own}/disk.raw\n",
        "with a NUL": f"{own}/disk.raw\0.qcow2",
        "with a right-to-left mark": f"{own}/disk\u202eraw",
        "an option": "-snapshot",
        "a protocol": "nbd:unix:/run/nbd",
        "JSON": f'json:{{"driver":"file","filename":"{site.secret}"}}',
        "a descriptor's protocol": "fd:3",
        "long": f"{own}/{'x' * 5000}",
        "deep": f"{own}{'/x' * 2000}/disk.raw",
    }


@pytest.mark.parametrize("file", ["kernel", "initramfs", "disk"])
async def test_a_path_that_leads_elsewhere(site: Attacked, machine: qemu_pb2.Machine, file: str) -> None:
    field, _ = FILES[file]
    for path in leading_elsewhere(site, machine).values():
        if file == "initramfs" and not path:
            continue  # there need not be one
        match file:
            case "kernel":
                machine.kernel_boot.kernel = path
            case "initramfs":
                machine.kernel_boot.initramfs = path
            case "disk":
                machine.disks[0].path = path
        error = await site.refuses(machine)
        assert isinstance(error, InvalidArgument | PermissionDenied | FailedPrecondition), path
        assert field in str(error), path


async def test_the_images_are_not_for_writing(site: Attacked, machine: qemu_pb2.Machine) -> None:
    disk = site.house.state.images / "idle" / "disk.raw"
    disk.write_bytes(bytes(512))
    site.give(disk)
    machine.disks[0].path = str(disk)
    await refused(site, machine, "disks[0].path", "does not lie in")
    disk.unlink()


def qcow2(backing_file_offset: int) -> bytes:
    head = b"QFI\xfb" + (3).to_bytes(4, "big") + backing_file_offset.to_bytes(8, "big")
    return head.ljust(1024, b"\0")


async def test_a_disk_that_leads_to_another_file(site: Attacked, machine: qemu_pb2.Machine) -> None:
    """QEMU would open what a qcow2 file names."""
    _write(machine.disks[0].path, qcow2(backing_file_offset=512))
    machine.disks[0].format = qemu_pb2.Disk.QCOW2
    await refused(site, machine, "disks[0].path", "names a backing file")


def file_is_swapped(path: Path, secret: Path, aside: Path) -> None:
    """For a moment a link is in a file's place: one that is followed by name, and one that is the file itself."""
    path.rename(aside)
    path.symlink_to(secret)
    path.unlink()
    if ROOT:  # for a single user all files are its own
        path.hardlink_to(secret)
        path.unlink()
    aside.rename(path)


def directory_is_swapped(path: Path, secret: Path, aside: Path) -> None:
    """The same with the directory that a file is in: the secret's has a file of the same name."""
    path.parent.rename(aside)
    path.parent.symlink_to(secret.parent)
    path.parent.unlink()
    aside.rename(path.parent)


@pytest.mark.parametrize("swap", [file_is_swapped, directory_is_swapped])
async def test_files_that_are_swapped_while_they_are_checked(
    site: Attacked, swap: Callable[[Path, Path, Path], None]
) -> None:
    """QEMU has descriptors, so what was checked is what it uses: it never gets the secret."""
    machine = site.machine()
    disk = Path(machine.disks[0].path)
    secret = site.outside / disk.name
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    before = secret.stat()
    secrets = {(before.st_dev, before.st_ino)}
    over = threading.Event()

    def swapping() -> None:
        aside = site.outside / "aside"
        for pause_s in itertools.cycle([0.0] * 20 + [0.01]):  # so that some starts succeed and some do not
            if over.wait(pause_s):
                return
            swap(disk, secret, aside)

    site.news()
    started, refusals = 0, 0
    reasons: set[str] = set()
    deadline_s = time.monotonic() + DEADLINE_S
    swapper = threading.Thread(target=swapping)
    swapper.start()
    try:
        while (started < 10 or refusals < 10) and time.monotonic() < deadline_s:
            try:
                process = await site.house.start(machine)
            except grpc.aio.AioRpcError as caught:
                reasons.add(from_rpc_error(caught).reason)
                refusals += 1
            else:
                assert secrets.isdisjoint(open_files(process.pid))
                await site.end(process)
                started += 1
    finally:
        over.set()
        swapper.join()
    assert min(started, refusals) >= 10
    assert reasons <= {"PATH_REFUSED", "FILE_MISSING"}
    assert [line["reason"] in reasons for line in site.news() if line["event"] == "refused"] == [True] * refusals
    after = secret.stat()
    assert (after.st_mode, after.st_uid, after.st_gid, after.st_size) == (
        (before.st_mode, before.st_uid, before.st_gid, before.st_size)
    )
    assert secret.read_bytes() == SECRET
    secret.unlink()
    with contextlib.suppress(FileNotFoundError):
        (site.outside / "console.log").unlink()
    site.forget(machine)


def open_files(pid: int) -> Iterator[tuple[int, int]]:
    """Device and inode of every file that a process has open."""
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it opens and closes others while it becomes the next program
            status = os.stat(f"/proc/{pid}/fd/{descriptor}")
            yield status.st_dev, status.st_ino


async def test_a_uid_that_leads_elsewhere(site: Attacked, machine: qemu_pb2.Machine) -> None:
    good = machine.uid
    for uid in ("", ".", "..", "../outside", f"../{good}", f"{good}/..", good.upper(), f"{{{good}}}", f"{good}\n", "0"):
        machine.uid = uid
        error = await site.refuses(machine)
        assert isinstance(error, InvalidArgument), uid
    machine.uid = str(uuid.uuid4())  # a good one, of which there is no directory
    error = await site.refuses(machine)
    assert isinstance(error, PermissionDenied | FailedPrecondition)
    machine.uid = good
