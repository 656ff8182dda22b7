"""The `vmherd` program."""

from __future__ import annotations

import io
import sys

from vmherd.cli.exit_codes import INTERRUPTED
from vmherd.cli.serve import PROCESSES, serve


def main() -> None:
    """Runs the command line and exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to fail
    name, *words = sys.argv[1:] or ("",)
    if name in PROCESSES:
        sys.exit(serve(name, words))
    try:
        from vmherd.cli.app import app  # noqa: PLC0415  (the three processes need none of it)
    except KeyboardInterrupt:  # it takes a second, and more on a busy machine
        sys.exit(INTERRUPTED)
    app(prog_name="vmherd")
