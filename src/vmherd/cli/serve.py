"""`vmherd qemu`, `vmherd controller`, `vmherd gateway`: the three processes, each from its settings file.

They are parsed with the standard library and load their own part alone. The helper is root's, and what it does not
load cannot be wrong in it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from vmherd.api.settings.v1.settings_pb2 import ControllerSettings, GatewaySettings, QemuSettings
from vmherd.cli import logging
from vmherd.cli.exit_codes import OK, exit_code
from vmherd.cli.report import tell
from vmherd.cli.settings import Settings, load_settings
from vmherd.model.errors import InvalidArgument, VmherdError


def qemu(options: argparse.Namespace) -> Coroutine[Any, Any, None]:
    """Runs the privileged helper, which starts QEMU."""
    from vmherd.qemu.app import run, tear_down  # noqa: PLC0415

    return (tear_down if options.teardown else run)(_prepare(options, QemuSettings))


def controller(options: argparse.Namespace) -> Coroutine[Any, Any, None]:
    """Runs the controller, which owns the instances and serves gRPC."""
    from vmherd.controller.app import run  # noqa: PLC0415

    return run(_prepare(options, ControllerSettings))


def gateway(options: argparse.Namespace) -> Coroutine[Any, Any, None]:
    """Runs the gateway, which serves HTTP."""
    from vmherd.gateway.app import run  # noqa: PLC0415

    return run(_prepare(options, GatewaySettings), address_file=options.address_file)


PROCESSES: Mapping[str, Callable[[argparse.Namespace], Coroutine[Any, Any, None]]] = MappingProxyType(
    {"qemu": qemu, "controller": controller, "gateway": gateway}
)


def serve(name: str, words: Sequence[str]) -> int:
    """Runs one of the three until it is asked to end by a signal, and gives the exit code."""
    parser = _Parser(prog=f"vmherd {name}", description=PROCESSES[name].__doc__)
    parser.set_defaults(identifier=f"vmherd-{name}")
    parser.add_argument("--settings", metavar="FILE", type=Path, required=True, help="the settings, as JSON")
    parser.add_argument(
        "--log-level", choices=logging.LEVELS, help="log this level and above, whatever the settings say"
    )
    if name == "qemu":
        parser.add_argument("--teardown", action="store_true", help="remove the networks that it made, and end")
    if name == "gateway":
        parser.add_argument(
            "--address-file", metavar="FILE", type=Path, help="write HOST:PORT there once requests are accepted"
        )
    os.umask(0o077)  # what the three write is for themselves
    # Until `until_signalled` listens: an end that is asked for during the start is orderly as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(PROCESSES[name](parser.parse_args(words)))
    except KeyboardInterrupt:
        return OK
    except VmherdError as error:
        tell(error)
        return exit_code(error)
    return OK


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgument(f"{message} (see `{self.prog} --help`)")


def _prepare(options: argparse.Namespace, kind: type[Settings]) -> Settings:
    settings = load_settings(options.settings, kind)
    level = options.log_level or settings.log_level or logging.DEFAULT_LEVEL
    logging.configure(level, identifier=options.identifier)
    return settings
