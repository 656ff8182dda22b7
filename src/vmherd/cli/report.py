"""How messages and errors become text."""

from __future__ import annotations

import sys

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from vmherd.model.errors import VmherdError
from vmherd.rpc.status import to_status


def printable(text: str) -> str:
    """The text on one line and without control characters, which could rewrite a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))


def to_json(message: Message) -> str:
    """The message in canonical JSON on one line, zero values included, in ASCII."""
    return MessageToJson(message, always_print_fields_with_no_presence=True, indent=None)


def tell(error: VmherdError, *, as_json: bool = False) -> None:
    """One line on standard error: for people, or the `google.rpc.Status` as JSON."""
    text = to_json(to_status(error)) if as_json else f"vmherd: {printable(error.message)}"
    print(text, file=sys.stderr)
