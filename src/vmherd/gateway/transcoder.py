"""HTTP requests as gRPC requests, by the google.api.http annotation of each method.

The path, the body and the query each give some of the request's fields.
https://github.com/googleapis/googleapis/blob/master/google/api/http.proto has the rules.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from vmherd.gateway import path_template, proto_json
from vmherd.gateway.descriptors import Api, Method
from vmherd.gateway.path_template import PathTemplate
from vmherd.model.errors import FieldViolation, InvalidArgument

WHOLE_BODY = "*"

FieldPath = tuple[FieldDescriptor, ...]
"""A field of a request, after the messages that it is nested in."""


@dataclass(frozen=True)
class Binding:
    """One HTTP method and path of one RPC."""

    method: Method
    number: int
    """0 for the method's annotation itself, from 1 on for its additional bindings."""
    http_method: str
    template: PathTemplate
    path_fields: tuple[FieldPath, ...]
    query_fields: tuple[FieldPath, ...]
    body: str
    """The field that the body gives; `WHOLE_BODY` for all that the path does not give, empty where there is no body."""

    def request(self, pool: DescriptorPool, captured: Sequence[str], query: bytes, body: bytes) -> Message:
        """The gRPC request. `captured` is what the template's variables matched; all three are as they came.

        Raises:
            InvalidArgument: a field is unknown, does not fit its type, or is given twice.
        """
        kind = GetMessageClass(self.method.descriptor.input_type)
        message, in_path = kind(), kind()
        proto_json.read(self._body_value(body), message, pool)
        proto_json.read(self._query_value(query), message, pool)
        proto_json.read(self._path_value(captured), in_path, pool)
        for path in self.path_fields:
            outside, inside = (functools.reduce(getattr, _names(path), it) for it in (message, in_path))
            if outside and outside != inside:
                why = f"the path says {proto_json.shown(inside)} and the body {proto_json.shown(outside)}"
                raise InvalidArgument.of([FieldViolation(proto_name(path), why)])
        message.MergeFrom(in_path)
        return message

    def _body_value(self, body: bytes) -> Any:
        if not self.body:
            if body:
                raise InvalidArgument("this method takes no body", reason="BODY_NOT_ALLOWED")
            return {}
        value = proto_json.load(body) if body else {}
        return value if self.body == WHOLE_BODY else {self.body: value}

    def _query_value(self, query: bytes) -> dict[str, Any]:
        given: dict[FieldPath, list[str]] = {}
        for name, text in pairs(query):
            path = self._parameters.get(name)
            if path is None:
                known = ", ".join(json_name(path) for path in self.query_fields) or "none"
                why = f"there is no such query parameter; this method has {known}"
                raise InvalidArgument.of([FieldViolation(name[: proto_json.SHOWN_CHARACTERS], why)])
            given.setdefault(path, []).append(text)
        value: dict[str, Any] = {}
        for path, texts in given.items():
            items = [proto_json.from_text(text, path[-1]) for text in texts]
            if len(items) > 1 and not path[-1].is_repeated:
                raise InvalidArgument.of([FieldViolation(proto_name(path), "it is given more than once")])
            _put(value, path, items if path[-1].is_repeated else items[0])
        return value

    @functools.cached_property
    def _parameters(self) -> Mapping[str, FieldPath]:
        return {name: path for path in self.query_fields for name in (json_name(path), proto_name(path))}

    def _path_value(self, captured: Sequence[str]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for raw, variable, path in zip(captured, self.template.variables, self.path_fields, strict=True):
            try:
                text = variable.decode(raw)
            except UnicodeDecodeError as error:
                raise InvalidArgument.of([FieldViolation(variable.field, "it is not UTF-8")]) from error
            _put(value, path, proto_json.from_text(text, path[-1]))
        return value


def bindings(api: Api) -> list[Binding]:
    """Every binding of every method, in the order of the protos.

    Raises:
        ValueError: an annotation is wrong, or asks for what this gateway cannot do.
    """
    return [_bind(method, number, rule) for method in api.methods for number, rule in enumerate(method.rules)]


def _bind(method: Method, number: int, rule: HttpRule) -> Binding:
    request = method.descriptor.input_type
    if method.descriptor.client_streaming or rule.response_body:
        raise ValueError(f"{method.descriptor.full_name}: no streams of requests and no response_body over HTTP")
    verb = rule.WhichOneof("pattern") or ""
    http_method, text = (
        (rule.custom.kind, rule.custom.path) if verb == "custom" else (verb.upper(), getattr(rule, verb))
    )
    template = path_template.parse(text)
    by_name = {proto_name(path): path for path in url_fields(request)}
    in_path = [variable.field for variable in template.variables]
    for name in in_path:
        if name not in by_name or by_name[name][-1].is_repeated or by_name[name][-1].message_type:
            raise ValueError(
                f"{method.descriptor.full_name}: a path cannot give {name} of {request.full_name} its value"
            )
    if rule.body not in {"", WHOLE_BODY, *request.fields_by_name}:
        raise ValueError(f"{method.descriptor.full_name}: {request.full_name} has no field {rule.body}")
    path_fields = tuple(by_name[name] for name in in_path)
    query_fields = tuple(
        path for name, path in by_name.items() if name not in in_path and rule.body not in {WHOLE_BODY, path[0].name}
    )
    return Binding(method, number, http_method, template, path_fields, query_fields, rule.body)


def url_fields(message: Descriptor, above: FieldPath = ()) -> Iterator[FieldPath]:
    """Every field, nested ones included, whose value can stand in a URL: no maps, no lists of messages."""
    for field in message.fields:
        path = (*above, field)
        kind = field.message_type
        if not kind or kind.full_name in proto_json.TEXT_FORMS or kind.full_name in proto_json.WRAPPERS:
            yield path
        elif not (field.is_repeated or kind.full_name in proto_json.FREE_FORMS or _holds(path, kind)):
            yield from url_fields(kind, path)


def _holds(path: FieldPath, kind: Descriptor) -> bool:
    return any(field.containing_type == kind for field in path)


def _names(path: FieldPath) -> list[str]:
    return [field.name for field in path]


def proto_name(path: FieldPath) -> str:
    """A field path as protos and `google.rpc.BadRequest` spell it."""
    return ".".join(_names(path))


def json_name(path: FieldPath) -> str:
    """A field path as JSON spells it."""
    return ".".join(field.json_name for field in path)


def _put(value: dict[str, Any], path: FieldPath, item: Any) -> None:
    for field in path[:-1]:
        value = value.setdefault(field.name, {})
    value[path[-1].name] = item


def pairs(query: bytes) -> list[tuple[str, str]]:
    """The names and values of a query.

    Raises:
        InvalidArgument: it is not UTF-8.
    """
    try:
        return parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except UnicodeError as error:
        raise InvalidArgument("the query is not UTF-8, percent-encoded", reason="MALFORMED_QUERY") from error
