"""The helper as a whole: `vmherd qemu`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import structlog

from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.api.settings.v1.settings_pb2 import QemuSettings
from vmherd.host.accelerator import as_this_user
from vmherd.host.host import Host
from vmherd.model.errors import FailedPrecondition
from vmherd.model.layout import RunDirectory
from vmherd.qemu import capabilities
from vmherd.qemu.files import Owners
from vmherd.qemu.launch import as_user
from vmherd.qemu.network.leftovers import teardown
from vmherd.qemu.network.networks import Networks
from vmherd.qemu.process_table import ProcessTable
from vmherd.qemu.service import QemuService
from vmherd.qemu.settings import understood
from vmherd.rpc.serving import check_socket_path, serve_until_signalled, serving

REQUEST_MAX_BYTES = 256 * 1024
"""Room for a machine with everything at its largest, many times over."""

LOCK_PATIENCE_S = 2.0
LOCK_POLL_S = 0.02
CALLS_MAX = 1024
"""At the same time: each takes memory, and a watch takes it for as long as its caller likes."""

_log = structlog.get_logger()


async def run(settings: QemuSettings) -> None:
    """Serves until it is asked to end by a signal. The machines run on, and so do their networks.

    Raises:
        InvalidArgument: a setting is wrong.
        FailedPrecondition: a directory is missing or not safe to use, a network cannot be had, or another helper is
            at work.
    """
    setup = understood(settings)
    check_socket_path(setup.run.longest_socket_path())
    if setup.owners.machines:
        capabilities.drop()
    if not os.access(setup.state.path, os.R_OK | os.W_OK | os.X_OK):
        raise _not_usable("state_dir", setup.state.path, "it is missing or this user may not write to it;")
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(owned(setup.run, setup.owners))
        if setup.owners.machines:  # root gives a socket to a group there
            _refuse_writable("listen", next(path for path in setup.listen.parents if path.exists()))
        networks = Networks(setup.networks, setup.run.networks, dnsmasq_uid=setup.uids.dnsmasq)
        processes = ProcessTable(setup.run, setup.owners, networks.unplug)
        stack.push_async_callback(networks.close)
        stack.push_async_callback(processes.close)
        processes.adopt()
        running = processes.running()
        await networks.open({it.uid: it.ports for it in running}, {it.uid: it.name for it in running})
        before = partial(as_user, setup.uids.probe) if setup.owners.machines else as_this_user
        host = Host(setup.qemu_binary, setup.accelerator, setup.state.accelerators, before=before)
        service = QemuService(processes, host, networks, setup.state, setup.owners)
        add = partial(qemu_pb2_grpc.add_QemuServiceServicer_to_server, service)
        name = qemu_pb2.DESCRIPTOR.services_by_name["QemuService"].full_name
        group = None if setup.owners.controller == os.geteuid() else setup.owners.group
        peers = setup.owners.trusted
        served = partial(serving, request_max_bytes=REQUEST_MAX_BYTES, calls_max=CALLS_MAX)
        await stack.enter_async_context(served({name: add}, setup.listen, group=group, peers=peers))
        _log.info("serving", listen=settings.listen, processes=len(processes.list()))
        await serve_until_signalled(f"serving on {settings.listen}")


async def tear_down(settings: QemuSettings) -> None:
    """Removes everything that helpers have made of the networks; once more does nothing more.

    Raises:
        InvalidArgument: a setting is wrong.
        FailedPrecondition: machines are plugged in, or a helper is at work.
    """
    setup = understood(settings)
    await teardown(setup.networks, setup.run.networks)


@contextlib.contextmanager
def owned(directory: RunDirectory, owners: Owners) -> Iterator[None]:
    """Makes the run directory and keeps others out: each would take the other's half-done start for a failed one.

    Raises:
        FailedPrecondition: it cannot be made, others may write to it, or another helper has it.
    """
    path = directory.instances
    with contextlib.ExitStack() as stack:
        try:
            directory.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                directory.path.mkdir(mode=0o700)
                os.chown(directory.path, -1, owners.group)
                directory.path.chmod(owners.mode(0o750))
            _refuse_writable("run_dir", directory.path)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            _refuse_writable("run_dir", path)
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, lock)
            _lock(lock)
            # Also of one that is there: its helper was killed before this, or had another controller.
            os.fchown(lock, -1, owners.group)
            os.fchmod(lock, owners.mode(0o750))
        except BlockingIOError as error:
            why = "another helper works in it; end that one first (`pgrep -af 'vmherd qemu'` finds it), or"
            raise _not_usable("run_dir", path, why) from error
        except OSError as error:
            raise _not_usable("run_dir", path, f"{error};") from error
        yield


def _lock(descriptor: int) -> None:
    """Locks a directory. A helper that was killed may have left a child that holds the lock until it executes QEMU."""
    deadline_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(LOCK_POLL_S)  # nothing else is under way yet


def _refuse_writable(setting: str, path: Path) -> None:
    """Refuses a directory that others may write to. Whose records root believed could have it kill any process.

    Where root works, nobody else may exchange a directory on the way to it either.
    """
    path = path.resolve()
    for directory in (path, *path.parents) if os.geteuid() == 0 else (path,):
        status = directory.stat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        sticky = directory != path and status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or (shared and not sticky):
            raise _not_usable(
                setting, path, f"others own {directory} or may write to it; `chown` it and `chmod go-w`, or"
            )


def _not_usable(setting: str, path: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{setting}: cannot use {path}: {why} choose another one",
        reason="DIRECTORY_NOT_USABLE",
        metadata={"setting": setting, "path": path},
    )
