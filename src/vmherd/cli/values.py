"""What people type, as values."""

from __future__ import annotations

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
