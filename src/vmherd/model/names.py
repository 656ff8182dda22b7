"""What names, labels and request ids may look like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from vmherd.model.errors import FieldViolation

NAME_MAX_LENGTH = 63
LABELS_MAX = 64
LABEL_VALUE_MAX_LENGTH = 255
REQUEST_ID_MAX_LENGTH = 64

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_./]{0,61}[A-Za-z0-9])?")
_REQUEST_ID = re.compile(r"[!-~]{1,64}")
_UID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def check_name(name: str, field: str = "name") -> Iterator[FieldViolation]:
    """An instance's name is a DNS label (RFC 1035), so that it also serves as host name."""
    if not name:
        yield FieldViolation(field, "must be given")
    elif len(name) > NAME_MAX_LENGTH:
        yield FieldViolation(field, f"must have at most {NAME_MAX_LENGTH} characters, has {len(name)}")
    elif not _NAME.fullmatch(name):
        yield FieldViolation(
            field,
            f"must start with a lower-case letter, hold only lower-case letters, digits and '-', "
            f"and not end with '-'; got {name!r}",
        )


def check_uid(uid: str, field: str = "uid") -> Iterator[FieldViolation]:
    """A uid is a UUID in its canonical lower-case spelling."""
    if not _UID.fullmatch(uid):
        yield FieldViolation(field, "must be a UUID in lower case")


def check_mac(mac: str, field: str = "mac") -> Iterator[FieldViolation]:
    """A MAC address is a unicast one, in lower case with colons, and not that of nobody."""
    if not _MAC.fullmatch(mac):
        yield FieldViolation(field, "must be a MAC address such as 52:54:00:12:34:56")
    elif int(mac[:2], 16) & 1:
        yield FieldViolation(field, "must be a unicast address, so its first byte must be even")
    elif not any(bytes.fromhex(mac.replace(":", ""))):
        yield FieldViolation(field, "must not be all zeros, for no network interface takes that")


def check_labels(labels: Mapping[str, str], field: str = "labels") -> Iterator[FieldViolation]:
    """Labels are short, printable and not too many."""
    if len(labels) > LABELS_MAX:
        yield FieldViolation(field, f"must be at most {LABELS_MAX}, are {len(labels)}")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            yield FieldViolation(
                f"{field}[{key[:NAME_MAX_LENGTH]!r}]",
                "a key has 1 to 63 letters, digits, '-', '_', '.' and '/', the first and last a letter or digit",
            )
        elif len(value) > LABEL_VALUE_MAX_LENGTH or not value.isprintable():
            yield FieldViolation(
                f"{field}[{key!r}]", f"a value has at most {LABEL_VALUE_MAX_LENGTH} printable characters"
            )


def check_request_id(request_id: str, field: str = "request_id") -> Iterator[FieldViolation]:
    """A request id is optional, short and printable."""
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        yield FieldViolation(
            field, f"must have at most {REQUEST_ID_MAX_LENGTH} printable ASCII characters and no space"
        )
