"""Messages from and to their canonical JSON, stricter than protobuf's own reader.

`google.protobuf.json_format` takes enum numbers that do not exist and skips characters that are not base64, and it
says only in prose which field is wrong. Here each wrong field is named by its path, as in `google.rpc.BadRequest`.
https://protobuf.dev/programming-guides/json/
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NoReturn, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message

from vmherd.model.errors import FieldViolation, InvalidArgument

MAX_VIOLATIONS = 16
SHOWN_CHARACTERS = 64

WRAPPERS = frozenset(
    f"google.protobuf.{kind}Value"
    for kind in ("Bool", "Bytes", "Double", "Float", "Int32", "Int64", "String", "UInt32", "UInt64")
)

TEXT_FORMS = {
    "google.protobuf.Duration": 'a duration in seconds such as "3.5s"',
    "google.protobuf.FieldMask": 'field names such as "name,labels"',
    "google.protobuf.Timestamp": 'a time such as "2030-01-31T12:00:00Z"',
}
"""Well-known types whose JSON is a string."""

FREE_FORMS = {
    "google.protobuf.Any": "an object with @type",
    "google.protobuf.ListValue": "an array",
    "google.protobuf.Struct": "an object",
    "google.protobuf.Value": "any JSON value",
}
"""Well-known types whose JSON is a value of some other shape."""

_OWN_FORMS = TEXT_FORMS | FREE_FORMS

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,4})?")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_ENUM_NUMBER = re.compile("-?[0-9]{1,10}")
_URL_SAFE = str.maketrans("-_", "+/")
_FLOAT32_MAX = math.nextafter((2 - 2**-24) * 2.0**127, 0)  # the largest number that rounds to one of 32 bits


def to_json(message: Message, pool: DescriptorPool) -> str:
    """The message in one line of JSON: lowerCamelCase names, zero values included."""
    value = json_format.MessageToDict(message, always_print_fields_with_no_presence=True, descriptor_pool=pool)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def load(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        InvalidArgument: it is not JSON, names a member twice, or holds what JSON has no room for.
    """
    try:
        text = body.decode()
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite, parse_int=_whole
        )
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except UnicodeError as error:
        raise _malformed("it is not UTF-8 text") from error
    except RecursionError as error:
        raise _malformed("it is nested too deep") from error
    except ValueError as error:
        raise _malformed(str(error)) from error
    return value


def _malformed(why: str) -> InvalidArgument:
    return InvalidArgument(f"the body is not JSON: {why}", reason="MALFORMED_JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{shown(name)} is given twice in one object")
        members[name] = value
    return members


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > sys.float_info.max_10_exp:
        raise ValueError(f"the number {shown(text)} is too large")
    return int(text)


def read(value: Any, message: Message, pool: DescriptorPool) -> None:
    """Fills a message from the value of its JSON.

    Raises:
        InvalidArgument: with one violation for each wrong field, `MAX_VIOLATIONS` at most.
    """
    reader = _Reader(pool)
    try:
        reader.message(value, message, "")
    except RecursionError as error:
        raise _malformed("it is nested too deep") from error
    if reader.violations:
        raise InvalidArgument.of(reader.violations)


@functools.cache
def _fields_by_either_name(message: Descriptor) -> dict[str, FieldDescriptor]:
    return dict(message.fields_by_name) | {field.json_name: field for field in message.fields}


def map_entry(field: FieldDescriptor) -> Descriptor | None:
    """The entry's type where the field is a map, which descriptors show as repeated entries."""
    kind = field.message_type
    return kind if kind and kind.GetOptions().map_entry else None


def shown(value: Any) -> str:
    """A value of the request as an error may repeat it: quoted, and short whatever was sent."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


class _Reader:
    def __init__(self, pool: DescriptorPool) -> None:
        self._pool = pool
        self.violations: list[FieldViolation] = []

    def _wrong(self, at: str, description: str) -> None:
        self.violations.append(FieldViolation(at or "body", description))
        if len(self.violations) == MAX_VIOLATIONS:
            raise InvalidArgument.of(self.violations)

    def message(self, value: Any, message: Message, at: str) -> None:
        kind = cast(Descriptor, message.DESCRIPTOR)
        if kind.full_name in WRAPPERS:
            self._scalar(value, kind.fields_by_name["value"], at, lambda it: setattr(message, "value", it))
        elif kind.full_name in _OWN_FORMS:
            self._well_known(value, message, at)
        elif isinstance(value, dict):
            self._members(value, message, kind, at)
        else:
            self._wrong(at, f"expected an object, got {shown(value)}")

    def _well_known(self, value: Any, message: Message, at: str) -> None:
        try:
            # Parse, unlike ParseDict, turns every exception into a ParseError.
            json_format.Parse(json.dumps(value), message, descriptor_pool=self._pool)
        except json_format.ParseError:
            self._wrong(at, f"expected {_OWN_FORMS[message.DESCRIPTOR.full_name]}, got {shown(value)}")

    def _members(self, members: dict[str, Any], message: Message, kind: Descriptor, at: str) -> None:
        fields = _fields_by_either_name(kind)
        given: set[str] = set()
        for name, value in members.items():
            field = fields.get(name)
            path = (f"{at}." if at else "") + (field.name if field else name[:SHOWN_CHARACTERS])
            if field is None:
                self._wrong(path, "there is no such field")
                continue
            if value is None and not _takes_null(field):
                continue
            choice = field.containing_oneof.full_name if field.containing_oneof else field.name
            if choice in given:
                self._wrong(path, "it, or another field that excludes it, is given already")
            given.add(choice)
            self._field(value, message, field, path)

    def _field(self, value: Any, message: Message, field: FieldDescriptor, at: str) -> None:
        if entry := map_entry(field):
            self._map(value, getattr(message, field.name), entry, at)
        elif field.is_repeated:
            if not isinstance(value, list):
                self._wrong(at, f"expected an array, got {shown(value)}")
                return
            items = getattr(message, field.name)
            for index, item in enumerate(value):
                if field.message_type:
                    self.message(item, items.add(), f"{at}[{index}]")
                else:
                    self._scalar(item, field, f"{at}[{index}]", items.append)
        elif field.message_type:
            part = getattr(message, field.name)
            part.SetInParent()
            self.message(value, part, at)
        else:
            self._scalar(value, field, at, lambda it: setattr(message, field.name, it))

    def _map(self, value: Any, entries: Any, entry: Descriptor, at: str) -> None:
        if not isinstance(value, dict):
            self._wrong(at, f"expected an object, got {shown(value)}")
            return
        key_field, value_field = entry.fields_by_name["key"], entry.fields_by_name["value"]
        for text, item in value.items():
            path = f"{at}[{shown(text)}]"
            try:
                key = _converted(from_text(text, key_field), key_field)
                if value_field.message_type:
                    self.message(item, entries[key], path)
                else:
                    entries[key] = _converted(item, value_field)
            except ValueError as error:
                self._wrong(path, str(error))

    def _scalar(self, value: Any, field: FieldDescriptor, at: str, put: Callable[[Any], None]) -> None:
        try:
            put(_converted(value, field))
        except ValueError as error:
            self._wrong(at, str(error))


def _takes_null(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.full_name == "google.protobuf.Value"


def from_text(text: str, field: FieldDescriptor) -> Any:
    """The JSON value that a text stands for where there are only texts: map keys, paths, queries."""
    if field.message_type and field.message_type.full_name in WRAPPERS:
        return from_text(text, field.message_type.fields_by_name["value"])
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return {"true": True, "false": False}.get(text, text)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM and _ENUM_NUMBER.fullmatch(text):
        return int(text)
    return text


def _converted(value: Any, field: FieldDescriptor) -> Any:
    """What protobuf takes for a JSON value in a field of this type; a ValueError says what was expected."""
    convert = _bytes if field.type == FieldDescriptor.TYPE_BYTES else _SCALARS[field.cpp_type]
    return convert(value, field)


def _integer(value: Any, field: FieldDescriptor) -> int:
    number = Decimal(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else value
    if isinstance(number, bool) or not isinstance(number, int | float | Decimal):
        raise ValueError(f"expected a whole number, got {shown(value)}")
    least, most = _INTEGERS[field.cpp_type]
    if not least <= number <= most or number % 1:
        raise ValueError(f"expected a whole number from {least} to {most}, got {shown(value)}")
    return int(number)


def _float(value: Any, field: FieldDescriptor) -> float:
    if value in _NOT_FINITE:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number, got {shown(value)}")
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        raise ValueError(f"expected a number, got {shown(value)}")
    most = _FLOAT32_MAX if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT else sys.float_info.max
    if abs(Decimal(value)) > most:
        raise ValueError(f"expected a number of at most {most:g}, got {shown(value)}")
    return float(value)


def _bool(value: Any, _field: FieldDescriptor) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {shown(value)}")
    return value


def _string(value: Any, _field: FieldDescriptor) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {shown(value)}")
    return value


def _bytes(value: Any, _field: FieldDescriptor) -> bytes:
    if isinstance(value, str):
        digits = value.rstrip("=")
        padding = "=" * (-len(digits) % 4)
        if value in {digits, digits + padding}:
            with contextlib.suppress(ValueError):
                return base64.b64decode(digits.translate(_URL_SAFE) + padding, validate=True)
    raise ValueError(f"expected base64, got {shown(value)}")


def _enum(value: Any, field: FieldDescriptor) -> int:
    known = cast(EnumDescriptor, field.enum_type)
    if isinstance(value, str) and value in known.values_by_name:
        return known.values_by_name[value].number
    if isinstance(value, int) and not isinstance(value, bool) and value in {it.number for it in known.values}:
        return value
    raise ValueError(f"expected one of {', '.join(known.values_by_name)}, got {shown(value)}")


_SCALARS: dict[int, Callable[[Any, FieldDescriptor], Any]] = {
    **dict.fromkeys(_INTEGERS, _integer),
    FieldDescriptor.CPPTYPE_DOUBLE: _float,
    FieldDescriptor.CPPTYPE_FLOAT: _float,
    FieldDescriptor.CPPTYPE_BOOL: _bool,
    FieldDescriptor.CPPTYPE_ENUM: _enum,
    FieldDescriptor.CPPTYPE_STRING: _string,
}
