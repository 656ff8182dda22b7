"""Where a controller's socket is, and where this user's own run directory is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vmherd.model.errors import Unavailable
from vmherd.model.layout import Herd

RUNDIR_VARIABLE = "VMHERD_RUNDIR"
SYSTEM_RUN_DIRECTORY = Path("/run/vmherd")


def named_run_directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The run directory that $VMHERD_RUNDIR names."""
    return Path(environ[RUNDIR_VARIABLE]) if environ.get(RUNDIR_VARIABLE) else None


def own_run_directory(environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """The run directory of a herd that this user keeps: /run/vmherd for root, one of the user's own otherwise."""
    if (os.getuid() if uid is None else uid) == 0:
        return SYSTEM_RUN_DIRECTORY
    # https://specifications.freedesktop.org/basedir-spec: unset where no login session was made.
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "vmherd"
    return own_state_directory(environ, uid) / "run"


def own_state_directory(environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """The state directory that goes with `own_run_directory`."""
    if (os.getuid() if uid is None else uid) == 0:
        return Path("/var/lib/vmherd")
    home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    return home / ".local" / "state" / "vmherd"


def _usual_run_directories(environ: Mapping[str, str], uid: int | None) -> Iterator[Path]:
    yield SYSTEM_RUN_DIRECTORY
    if (own := own_run_directory(environ, uid)) != SYSTEM_RUN_DIRECTORY:
        yield own
        # Where `vmherd up` was started from, say, cron, and we from a login session.
        if (fallback := own_state_directory(environ, uid) / "run") != own:
            yield fallback


def find_controller(
    rundir: Path | None = None, environ: Mapping[str, str] = os.environ, uid: int | None = None
) -> Path:
    """The controller's socket: in `rundir`, in $VMHERD_RUNDIR, or the first of the usual places that has one.

    Raises:
        Unavailable: there is no socket.
    """
    rundir = rundir or named_run_directory(environ)
    looked_in = (rundir,) if rundir else tuple(_usual_run_directories(environ, uid))
    for directory in looked_in:
        socket = Herd(directory).controller_socket.absolute()
        if os.path.exists(socket):  # Path.exists raises where a directory may not be entered
            return socket
    raise Unavailable(
        f"no controller's socket in {' or '.join(map(str, looked_in))}; "
        "start one with `./start.sh` or `vmherd up`, or name the directory with --rundir",
        reason="CONTROLLER_NOT_FOUND",
    )
