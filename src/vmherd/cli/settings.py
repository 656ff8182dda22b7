"""Settings files: JSON into the messages of `vmherd.api.settings.v1`, with everything that is wrong named at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.duration_pb2 import Duration

from vmherd.api.settings.v1.settings_pb2 import ControllerSettings, GatewaySettings, QemuSettings
from vmherd.cli.logging import LEVELS
from vmherd.model.errors import InvalidArgument

ID_END = 2**32 - 1
"""No user and no group has this number: chown(2) takes it for 'leave it as it is'."""

# useradd(8) is stricter; other directories of users are not.
_ACCOUNT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")

Settings = TypeVar("Settings", QemuSettings, ControllerSettings, GatewaySettings)


def check_path(path: str) -> Iterator[str]:
    """A path is absolute: the process may be started from anywhere."""
    if not path.startswith("/"):
        yield f"must be an absolute path, is {path!r}"


def check_program(program: str) -> Iterator[str]:
    """A program is a name for the PATH or an absolute path."""
    if "/" in program and not program.startswith("/"):
        yield f"must be a name or an absolute path, is {program!r}"


def check_address(address: str) -> Iterator[str]:
    """An address is HOST:PORT, an IPv6 host in brackets."""
    host, _, port = address.rpartition(":")
    if not host or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        yield f"must be HOST:PORT, for instance 127.0.0.1:8080 or [::1]:8080, is {address!r}"
    elif not (port.isascii() and port.isdigit() and int(port) <= 65535):
        yield f"must have a port from 0 to 65535, is {address!r}"


def check_duration(duration: Duration) -> Iterator[str]:
    """A duration that is given is longer than nothing."""
    if duration.ToTimedelta().total_seconds() <= 0:
        yield "must be longer than 0 s"


def check_level(level: str) -> Iterator[str]:
    """A log level is one of ours."""
    if level not in LEVELS:
        yield f"must be one of {', '.join(LEVELS)}, is {level!r}"


def check_accelerator(number: int) -> Iterator[str]:
    """An accelerator is one that exists: the parser lets any number pass."""
    if number not in QemuSettings.Accelerator.values():
        yield f"must be AUTO, KVM or TCG, is {number}"


def check_account(account: str) -> Iterator[str]:
    """A user or a group is a name or a number. Whether the host has it is seen by who uses it."""
    if account.isascii() and account.isdecimal():
        if int(account) >= ID_END:
            yield f"must be a number below {ID_END}, is {account}"
    elif not _ACCOUNT_NAME.fullmatch(account):
        yield f"must be a name or a number, is {account!r}"


REQUIRED: Mapping[type, tuple[str, ...]] = {
    QemuSettings: ("listen", "run_dir", "state_dir"),
    ControllerSettings: ("listen", "qemu", "run_dir", "state_dir"),
    GatewaySettings: ("listen", "controller"),
}

CHECKS: Mapping[type, Mapping[str, Callable[[Any], Iterator[str]]]] = {
    QemuSettings: {
        "listen": check_path,
        "run_dir": check_path,
        "state_dir": check_path,
        "qemu_binary": check_program,
        "accelerator": check_accelerator,
        "log_level": check_level,
        "controller_user": check_account,
    },
    ControllerSettings: {
        "listen": check_path,
        "listen_tcp": check_address,
        "qemu": check_path,
        "run_dir": check_path,
        "state_dir": check_path,
        "token_file": check_path,
        "stop_grace": check_duration,
        "agent_timeout": check_duration,
        "log_level": check_level,
        "socket_group": check_account,
    },
    GatewaySettings: {
        "listen": check_address,
        "controller": check_path,
        "token_file": check_path,
        "log_level": check_level,
    },
}


def load_settings(path: Path, kind: type[Settings]) -> Settings:
    """The settings in a file.

    Raises:
        InvalidArgument: the file cannot be read, is not JSON, or says something that makes no sense.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise InvalidArgument(f"cannot read the settings file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path}: not UTF-8 text, at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error.message}") from error
    _refuse(path, _problems_of_form(document, kind.DESCRIPTOR))
    try:
        settings = json_format.ParseDict(document, kind())
    except json_format.ParseError as error:
        raise InvalidArgument(f"{path}: {str(error).splitlines()[0].rstrip('.')}") from error
    _refuse(path, _problems_of_content(settings))
    return settings


def _refuse(path: Path, problems: Iterator[str]) -> None:
    if listed := "; ".join(problems):
        raise InvalidArgument(f"{path}: {listed}")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise InvalidArgument(f"the field {key!r} is there twice")
        seen[key] = value
    return seen


def _problems_of_form(document: object, message: Descriptor, at: str = "") -> Iterator[str]:
    if not isinstance(document, dict):
        yield f"{at}{' ' if at else ''}must be a JSON object, `{{ … }}`"
        return
    prefix = f"{at}." if at else ""
    known = {name: field for field in message.fields for name in (field.name, field.json_name)}
    names = ", ".join(field.name for field in message.fields)
    for key, value in document.items():
        if key not in known:
            yield f"unknown field {prefix + key!r}; the fields are {names}"
            continue
        nested = known[key].message_type
        # A duration is a string in JSON, and the parser says better than we what is wrong with one.
        if nested is None or nested.file.package != message.file.package or value is None:
            continue
        if not known[key].is_repeated:
            yield from _problems_of_form(value, nested, f"{prefix}{key}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from _problems_of_form(item, nested, f"{prefix}{key}[{index}]")


def _problems_of_content(settings: QemuSettings | ControllerSettings | GatewaySettings) -> Iterator[str]:
    present = {field.name: value for field, value in settings.ListFields()}
    for name in REQUIRED[type(settings)]:
        if name not in present:
            yield f"{name} is required"
    for name, check in CHECKS[type(settings)].items():
        if name in present:
            yield from (f"{name} {problem}" for problem in check(present[name]))
    if isinstance(settings, ControllerSettings) and settings.listen_tcp and not settings.token_file:
        yield "token_file is required with listen_tcp"
    if isinstance(settings, GatewaySettings) and not settings.token_file and not settings.no_token:
        yield "token_file is required unless no_token is true"
