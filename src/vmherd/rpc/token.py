"""The bearer token, as it stands in its file."""

from __future__ import annotations

import re
from pathlib import Path

from vmherd.model.errors import FailedPrecondition

_TOKEN = re.compile(rb"[\x21-\x7e]+")


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        FailedPrecondition: the file cannot be read, or holds no token.
    """
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        why = f"cannot read the token file {path}: {error.strerror}"
        raise FailedPrecondition(why, reason="TOKEN_NOT_READABLE") from error
    if not _TOKEN.fullmatch(token):
        why = f"the token file {path} holds no token: expected one line of printable ASCII without spaces"
        raise FailedPrecondition(why, reason="TOKEN_NOT_USABLE")
    return token.decode()
