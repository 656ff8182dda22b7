"""Between the guest agent's JSON and the messages of GuestService, by the descriptors alone.

A field `rx_bytes` is the member `rx-bytes`, bytes are base64, enum values are lower-case words with hyphens. A result
that is no object goes into the response's only field.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_KINDS: dict[int, tuple[type, ...]] = {
    FieldDescriptor.CPPTYPE_BOOL: (bool,),
    FieldDescriptor.CPPTYPE_STRING: (str,),
    FieldDescriptor.CPPTYPE_INT32: (int,),
    FieldDescriptor.CPPTYPE_INT64: (int,),
    FieldDescriptor.CPPTYPE_UINT32: (int,),
    FieldDescriptor.CPPTYPE_UINT64: (int,),
    FieldDescriptor.CPPTYPE_DOUBLE: (float, int),
    FieldDescriptor.CPPTYPE_ENUM: (str,),
    FieldDescriptor.CPPTYPE_MESSAGE: (dict,),
}
"""What JSON has for each kind of field."""


class Mismatch(ValueError):
    """What the agent said does not have the shape that its reference gives it."""


def arguments_of(message: Message) -> dict[str, object]:
    """The arguments of an agent command: every field that is set, but the instance's `name`."""
    return {_member(field): _to_json(field, value) for field, value in message.ListFields() if field.name != "name"}


def fill(message: Message, result: object) -> None:
    """Puts an agent command's result into its response. Members that the response does not have are passed over.

    Raises:
        Mismatch: a value does not fit its field.
    """
    fields = message.DESCRIPTOR.fields
    if isinstance(result, dict):
        members = {str(name).replace("-", "_"): value for name, value in result.items()}
        for field in fields:
            if members.get(field.name) is not None:
                _fill_field(message, field, members[field.name])
    elif len(fields) == 1:
        _fill_field(message, fields[0], result)
    else:
        raise Mismatch(f"the agent's result is no object: {type(result).__name__}")


def _fill_field(message: Message, field: Any, value: object) -> None:
    if not field.is_repeated:
        if field.message_type:
            fill(getattr(message, field.name), _checked(field, value))
            getattr(message, field.name).SetInParent()
        else:
            _guarded(field, lambda: setattr(message, field.name, _from_json(field, value)))
        return
    if not isinstance(value, list):
        raise Mismatch(f"{_member(field)} is no list but {type(value).__name__}")
    items: Any = getattr(message, field.name)
    for item in value:
        if field.message_type:
            fill(items.add(), _checked(field, item))
        else:
            _guarded(field, lambda item=item: items.append(_from_json(field, item)))


def _guarded(field: FieldDescriptor, assign: Any) -> None:
    try:
        assign()
    except (ValueError, TypeError) as error:  # a number that the field has no room for
        raise Mismatch(f"{_member(field)}: {error}") from error


def _checked(field: FieldDescriptor, value: object) -> object:
    kinds = _KINDS[field.cpp_type]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise Mismatch(f"{_member(field)} is no {kinds[0].__name__} but {type(value).__name__}")
    return value


def _from_json(field: FieldDescriptor, value: object) -> object:
    checked = _checked(field, value)
    if field.type == FieldDescriptor.TYPE_BYTES:
        try:
            return base64.b64decode(str(checked), validate=True)
        except binascii.Error as error:
            raise Mismatch(f"{_member(field)} is no base64: {error}") from error
    if field.enum_type:
        word = str(checked).upper().replace("-", "_")
        if word not in field.enum_type.values_by_name:
            raise Mismatch(f"{_member(field)} has no value {checked!r:.50}")
        return field.enum_type.values_by_name[word].number
    # JSON can spell half of a surrogate pair, and UTF-8 cannot.
    return checked.encode("utf-8", "replace").decode() if isinstance(checked, str) else checked


def _to_json(field: FieldDescriptor, value: Any) -> object:
    if field.is_repeated:
        return [_item_to_json(field, item) for item in value]
    return _item_to_json(field, value)


def _item_to_json(field: FieldDescriptor, value: Any) -> object:
    if field.message_type:
        return {_member(inner): _to_json(inner, item) for inner, item in value.ListFields()}
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    if field.enum_type:
        return str(field.enum_type.values_by_number[value].name).lower().replace("_", "-")
    return value


def _member(field: FieldDescriptor) -> str:
    return str(field.name).replace("_", "-")
