"""What people type, as values."""

from __future__ import annotations

import signal
from datetime import timedelta

import typer
from google.protobuf.duration_pb2 import Duration


def pairs(given: list[str], option: str) -> dict[str, str]:
    """The KEY=VALUE arguments of a repeated option."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{option} wants KEY=VALUE, got {text!r}")
        found[key] = value
    return found


def duration(seconds: float | None) -> Duration | None:
    """The message for a time in seconds."""
    if seconds is None:
        return None
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def signal_number(text: str, option: str) -> int:
    """The number of a signal given as a number or a name, with or without SIG."""
    name = text.upper()
    known = signal.Signals.__members__
    found = known.get(name) or known.get(f"SIG{name}")
    if found:
        return found
    if name.isdecimal():
        return int(name)
    raise typer.BadParameter(f"{option} wants a signal such as TERM or 15, got {text!r}")
