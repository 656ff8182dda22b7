"""The helper as a whole: `vmherd qemu`."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import structlog

from vmherd.api.qemu.v1 import qemu_pb2, qemu_pb2_grpc
from vmherd.api.settings.v1.settings_pb2 import QemuSettings
from vmherd.model.errors import FailedPrecondition, InvalidArgument
from vmherd.model.layout import RunDirectory, StateDirectory
from vmherd.model.machine import check_path
from vmherd.qemu.host import Host
from vmherd.qemu.process_table import ProcessTable
from vmherd.qemu.service import QemuService
from vmherd.rpc.serving import check_socket_path, serving, until_signalled

WANTED: Mapping[int, Literal["auto", "kvm", "tcg"]] = {
    QemuSettings.ACCELERATOR_UNSPECIFIED: "auto",
    QemuSettings.AUTO: "auto",
    QemuSettings.KVM: "kvm",
    QemuSettings.TCG: "tcg",
}

_log = structlog.get_logger()


async def run(settings: QemuSettings) -> None:
    """Serves until it is asked to end by a signal. The machines run on.

    Raises:
        InvalidArgument: a setting is wrong.
        FailedPrecondition: a directory is missing or not writable, or another helper is at work.
    """
    paths = {"listen": settings.listen, "run_dir": settings.run_dir, "state_dir": settings.state_dir}
    violations = [violation for field, path in paths.items() for violation in check_path(path, field)]
    if violations:
        raise InvalidArgument.of(violations)
    run_directory, state = RunDirectory(Path(settings.run_dir)), StateDirectory(Path(settings.state_dir))
    check_socket_path(run_directory.longest_socket_path())
    if not os.access(state.path, os.R_OK | os.W_OK | os.X_OK):
        raise _not_usable("state_dir", state.path, "it is missing or this user may not write to it;")
    with _owned(run_directory), contextlib.closing(ProcessTable(run_directory)) as processes:
        processes.adopt()
        host = Host(settings.qemu_binary, WANTED[settings.accelerator], state.accelerators)
        service = QemuService(processes, host, run_directory, state)
        add = partial(qemu_pb2_grpc.add_QemuServiceServicer_to_server, service)
        name = qemu_pb2.DESCRIPTOR.services_by_name["QemuService"].full_name
        async with serving({name: add}, Path(settings.listen)):
            _log.info("serving", listen=settings.listen, processes=len(processes.list()))
            await until_signalled()


@contextlib.contextmanager
def _owned(directory: RunDirectory) -> Iterator[None]:
    """Makes the directory and keeps other helpers out: each would take the other's half-done start for a failed one."""
    path = directory.instances
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            why = "another helper works in it; end that one first (`pgrep -af 'vmherd qemu'` finds it), or"
            raise _not_usable("run_dir", path, why) from error
        except OSError as error:
            raise _not_usable("run_dir", path, f"{error};") from error
        yield


def _not_usable(setting: str, path: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{setting}: cannot use {path}: {why} choose another one",
        reason="DIRECTORY_NOT_USABLE",
        metadata={"setting": setting, "path": path},
    )
