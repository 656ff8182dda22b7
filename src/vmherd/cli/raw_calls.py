"""What people type as a raw call of an agent's command, and how its result is printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer
from rich.table import Table

from vmherd.api.v1.guest_pb2 import DESCRIPTOR
from vmherd.cli.report import printable
from vmherd.cli.show import open_console
from vmherd.guest_agent import AgentInfo
from vmherd.model.errors import InvalidArgument

PREFIX = "guest-"

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ARGUMENTS",
        help="The command's arguments: one JSON object, or words. A VALUE is JSON, or else the text itself.",
    ),
]


def full_name(typed: str) -> str:
    """The command's name, whose `guest-` may be left out."""
    return typed if typed.startswith(PREFIX) else PREFIX + typed


def arguments(words: Sequence[str]) -> dict[str, object]:
    """The arguments that were typed.

    Raises:
        InvalidArgument: they are neither one JSON object nor KEY=VALUE words, or JSON that no agent could be sent.
    """
    if len(words) == 1 and words[0].lstrip()[:1] in ("{", "["):
        try:
            found = json.loads(words[0])
            json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"the arguments are not JSON: {error}") from error
        if not isinstance(found, dict):
            raise InvalidArgument("the arguments are a JSON list; an agent wants an object, {…}")
        return found
    return dict(map(_pair, words))


def _pair(word: str) -> tuple[str, object]:
    key, equals, text = word.partition("=")
    if not key or not equals:
        raise InvalidArgument(f"arguments are one JSON object or words KEY=VALUE, and {word!r} is neither")
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = text
    return key, value


def print_result(value: object, *, as_json: bool) -> None:
    """Prints a command's result as JSON, exact and in ASCII: for people in lines, otherwise on one."""
    indent = 2 if sys.stdout.isatty() and not as_json else None
    print(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"))


def print_commands(info: AgentInfo) -> None:
    """Prints what an agent can do."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("COMMAND", "ENABLED", "REPLIES"):
        table.add_column(heading, no_wrap=True)
    for name, command in sorted(info.commands.items()):
        replies = "always" if command.success_response else "to failure alone"
        table.add_row(
            printable(name), "yes" if command.enabled else "no", replies, style="" if command.enabled else "dim"
        )
    console = open_console()
    console.print(f"guest agent {printable(info.version)}, {len(info.commands)} commands")
    console.print(table)


def known_names() -> list[str]:
    """The commands that vmherd knows, for when no agent can be asked."""
    methods = DESCRIPTOR.services_by_name["GuestService"].methods
    names = (re.sub("(?<!^)(?=[A-Z])", "-", method.name).lower() for method in methods)
    return [PREFIX + name for name in names if name != "execute"]


def spellings(names: Iterable[str]) -> list[str]:
    """Both ways to write each command."""
    return sorted({spelling for name in names for spelling in (name, name.removeprefix(PREFIX))})


def is_short(spelling: str) -> bool:
    """Tells the shorter of the two ways."""
    return not spelling.startswith(PREFIX)
