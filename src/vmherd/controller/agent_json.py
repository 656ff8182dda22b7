"""Between the guest agent's JSON and the messages of GuestService, by the descriptors alone.

A field `rx_bytes` is the member `rx-bytes`, bytes are base64, enum values are lower-case words with hyphens. A result
that is no object goes into the response's only field. What JSON writes as one member of several kinds is a oneof here:
the member has the oneof's name.
"""

from __future__ import annotations

import base64
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from vmherd.model.errors import FieldViolation, InvalidArgument

_OWN_FIELDS = {"name", "thaw_after"}
"""What a request has for vmherd itself."""

_OPTIONAL_LISTS = {"arg", "env", "mountpoints"}
"""Lists that an agent may go without; protobuf has no mark for these."""

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


def arguments_of(request: Message) -> dict[str, object]:
    """The arguments of an agent command: what the request has beside the fields of vmherd's own.

    Raises:
        InvalidArgument: the agent would misunderstand a value.
    """
    fields: Any = request.DESCRIPTOR.fields
    return _members(request, [field for field in fields if field.name not in _OWN_FIELDS])


def _members(message: Message, fields: Any) -> dict[str, object]:
    members: dict[str, object] = {}
    for field in fields:
        value = getattr(message, field.name)
        if _is_sent(message, field, value):
            members[_member(field)] = (
                [_to_json(field, item) for item in value] if field.is_repeated else _to_json(field, value)
            )
    return members


def _is_sent(message: Message, field: FieldDescriptor, value: Any) -> bool:
    if field.enum_type:
        return bool(value)  # the zero value says that it is not set
    if field.is_repeated:
        return bool(value) or field.name not in _OPTIONAL_LISTS
    # A plain field is sent with its zero value too: that may be the very offset or state that is asked for.
    return not field.has_presence or message.HasField(field.name)


def _to_json(field: FieldDescriptor, value: Any) -> object:
    if field.message_type:
        return _members(value, value.DESCRIPTOR.fields)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    if field.enum_type:
        return _word(field, value)
    if isinstance(value, str):
        _check_text(field, value)
    return value


def _word(field: FieldDescriptor, number: int) -> str:
    enum: Any = field.enum_type
    if number not in enum.values_by_number:  # protobuf lets any number pass
        words = ", ".join(value.name for value in enum.values[1:])
        raise InvalidArgument.of([FieldViolation(field.name, f"must be one of {words}, is {number}")])
    return str(enum.values_by_number[number].name).lower().replace("_", "-")


def _check_text(field: FieldDescriptor, text: str) -> None:
    if "\0" in text:  # QEMU's JSON parser makes two other bytes of it
        raise InvalidArgument.of([FieldViolation(field.name, "must not hold a NUL character")])
    if not (text or field.has_presence or field.is_repeated):
        raise InvalidArgument.of([FieldViolation(field.name, "must be given")])


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
    except (ValueError, TypeError) as error:  # no base64, or a number that the field has no room for
        raise Mismatch(f"{_member(field)}: {error}") from error


def _checked(field: FieldDescriptor, value: object) -> object:
    kinds = _KINDS[field.cpp_type]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise Mismatch(f"{_member(field)} is no {kinds[0].__name__} but {type(value).__name__}")
    return value


def _from_json(field: FieldDescriptor, value: object) -> object:
    checked = _checked(field, value)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64decode(str(checked), validate=True)
    if field.enum_type:
        # An agent may be newer than this API, and its new word is no reason to lose the rest of what it says.
        word = field.enum_type.values_by_name.get(str(checked).upper().replace("-", "_"))
        return word.number if word else 0
    # JSON can spell half of a surrogate pair, and UTF-8 cannot.
    return checked.encode("utf-8", "replace").decode() if isinstance(checked, str) else checked


def _member(field: FieldDescriptor) -> str:
    oneof = field.containing_oneof
    # An `optional` field is alone in a oneof that only protobuf named.
    name = oneof.name if oneof and len(oneof.fields) > 1 else field.name
    return str(name).replace("_", "-")
