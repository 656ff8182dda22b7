"""The OpenAPI 3.1 description of the HTTP API, made from the descriptors and the comments of the protos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor

from vmherd.gateway import files, proto_json, streams
from vmherd.gateway.descriptors import API_PACKAGE, Api
from vmherd.gateway.transcoder import WHOLE_BODY, Binding, FieldPath, json_name, proto_name

Json = dict[str, Any]

_ABOUT = """\
The same API as gRPC's, one operation for each RPC.

JSON follows the [canonical mapping](https://protobuf.dev/programming-guides/json/): names in lowerCamelCase (requests
may use the protos' spelling as well), 64-bit integers as strings, zero values printed. An error is a
`google.rpc.Status`.
"""
_STREAM = """\
A stream of messages, each a line `{"result": …}`, or with `Accept: text/event-stream` a server-sent event. An error
that comes after the first message is the last line, `{"error": …}`, or an event of type `error`.
"""

_SCALARS: dict[int, Json] = {
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.CPPTYPE_INT64: {"type": "string", "format": "int64", "pattern": "^-?[0-9]{1,19}$"},
    FieldDescriptor.CPPTYPE_STRING: {"type": "string"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer", "format": "uint32", "minimum": 0, "maximum": 2**32 - 1},
    FieldDescriptor.CPPTYPE_UINT64: {"type": "string", "format": "uint64", "pattern": "^[0-9]{1,20}$"},
}
_BYTES: Json = {"type": "string", "contentEncoding": "base64"}

_WELL_KNOWN: dict[str, Json] = {
    "google.protobuf.Any": {"type": "object", "required": ["@type"], "properties": {"@type": {"type": "string"}}},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]{1,12}(\.[0-9]{1,9})?s$"},
    "google.protobuf.Empty": {"type": "object"},
    "google.protobuf.FieldMask": {"type": "string"},
    "google.protobuf.ListValue": {"type": "array", "items": {}},
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Value": {},
}

_STATUS: Json = {
    "type": "object",
    "description": "An error, https://google.aip.dev/193.",
    "required": ["code", "message", "details"],
    "properties": {
        "code": {"type": "integer", "format": "int32", "description": "The code of gRPC, not of HTTP."},
        "message": {"type": "string", "description": "What went wrong, for people."},
        "details": {
            "type": "array",
            "description": "One `google.rpc.ErrorInfo` with a `reason` for programs, and what else fits the error.",
            "items": _WELL_KNOWN["google.protobuf.Any"],
        },
    },
}
_TIMEOUT: Json = {
    "name": "Grpc-Timeout",
    "in": "header",
    "description": "A number and one of H, M, S, m, u, n: how long the call may take. Default: 600S, streams no limit.",
    "schema": {"type": "string", "pattern": "^[0-9]{1,8}[HMSmun]$"},
}

_NAME: Json = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "Name of the instance.",
    "schema": {"type": "string"},
}
_PATH: Json = {
    "name": "path",
    "in": "query",
    "required": True,
    "description": "Absolute path in the guest.",
    "schema": {"type": "string", "pattern": "^/"},
}
_ARCHIVE: Json = {
    "name": "archive",
    "in": "query",
    "required": False,
    "description": "For a folder: it comes, and goes, as a tar archive of what is in it.",
    "schema": {"type": "string", "enum": ["tar"]},
}
_MODE: Json = {
    "name": "mode",
    "in": "query",
    "required": False,
    "description": "Permission bits in octal. Default: those of the file that is replaced, or 0644.",
    "schema": {"type": "string", "pattern": "^0?[0-7]{1,4}$"},
}
_PLAIN: Json = {"schema": {"type": "string", "format": "binary"}}
_FILE: Json = {
    "description": (
        "The file as it is. `Vmherd-Mode` has its permission bits in octal, `Vmherd-Notice` what is not done as asked. "
        "An answer that breaks off before its end was not read whole."
    ),
    "content": {"application/octet-stream": _PLAIN, "application/x-tar": _PLAIN},
}
_FILES: dict[str, dict[str, Json]] = {
    f"{API_PACKAGE}.FileService.ReadFile": {
        "get": {"parameters": [_PATH, _ARCHIVE], "responses": {"200": _FILE}},
        "head": {"parameters": [_PATH, _ARCHIVE], "responses": {"200": {"description": "What GET would say of it."}}},
    },
    f"{API_PACKAGE}.FileService.WriteFile": {
        "put": {
            "parameters": [_PATH, _ARCHIVE, _MODE],
            "requestBody": {"content": {"*/*": _PLAIN}, "description": "The file as it is, of any type."},
        },
    },
}
"""What `gateway.files` makes of these RPCs, beside what all operations have."""


def document(api: Api, bindings: Sequence[Binding], *, needs_token: bool) -> Json:
    """The document as JSON."""
    writer = _Writer(api)
    paths: dict[str, Json] = {}
    for binding in bindings:
        paths.setdefault(binding.template.openapi, {})[binding.http_method.lower()] = writer.operation(binding)
    for method in api.methods:
        if method.descriptor.full_name in _FILES:
            paths.setdefault(files.TEMPLATE.openapi, {}).update(writer.files_operations(method.descriptor))
    services = dict.fromkeys(method.descriptor.containing_service for method in api.methods)
    components: Json = {
        "schemas": {**dict(sorted(writer.schemas.items())), "google.rpc.Status": _STATUS},
        "parameters": {"GrpcTimeout": _TIMEOUT},
        "responses": {
            "Error": {
                "description": "It went wrong.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/google.rpc.Status"}}},
            }
        },
    }
    if needs_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vmherd", "version": API_PACKAGE.rpartition(".")[2], "description": _ABOUT},
        "tags": [{"name": it.name, "description": api.comments.get(it.full_name, "")} for it in services],
        "paths": paths,
        "components": components,
        "security": [{"token": []}] if needs_token else [],
    }


class _Writer:
    """Writes operations, and gathers the schemas that they refer to."""

    def __init__(self, api: Api) -> None:
        self._comments = api.comments
        self.schemas: dict[str, Json] = {}

    def operation(self, binding: Binding) -> Json:
        method = binding.method.descriptor
        comment = self._comments.get(method.full_name, "")
        suffix = f"_{binding.number + 1}" if binding.number else ""
        operation: Json = {
            "operationId": f"{method.containing_service.name}_{method.name}{suffix}",
            "tags": [method.containing_service.name],
            "summary": comment.partition("\n")[0],
            "description": comment,
            "parameters": [
                *(self._parameter(path, proto_name(path), "path") for path in binding.path_fields),
                *(self._parameter(path, json_name(path), "query") for path in binding.query_fields),
                {"$ref": "#/components/parameters/GrpcTimeout"},
            ],
        }
        if binding.body:
            operation["requestBody"] = {"content": {"application/json": {"schema": self._body(binding)}}}
        operation["responses"] = {
            "200": self._answer(method.output_type, is_stream=method.server_streaming),
            "default": {"$ref": "#/components/responses/Error"},
        }
        return operation

    def files_operations(self, method: MethodDescriptor) -> dict[str, Json]:
        """The operations, by HTTP method, of an RPC whose messages are plain bytes over HTTP."""
        comment = self._comments.get(method.full_name, "")
        operations = {}
        for http_method, own in _FILES[method.full_name].items():
            suffix = "_head" if http_method == "head" else ""
            responses = own.get("responses") or {"200": self._answer(method.output_type, is_stream=False)}
            operations[http_method] = own | {
                "operationId": f"{method.containing_service.name}_{method.name}{suffix}",
                "tags": [method.containing_service.name],
                "summary": comment.partition("\n")[0],
                "description": comment,
                "parameters": [_NAME, *own["parameters"], {"$ref": "#/components/parameters/GrpcTimeout"}],
                "responses": responses | {"default": {"$ref": "#/components/responses/Error"}},
            }
        return operations

    def _parameter(self, path: FieldPath, name: str, place: str) -> Json:
        return {
            "name": name,
            "in": place,
            "required": place == "path",
            "description": self._comment(path[-1]),
            "schema": self._field(path[-1]),
        }

    def _body(self, binding: Binding) -> Json:
        request = binding.method.descriptor.input_type
        if binding.body != WHOLE_BODY:
            return self._field(request.fields_by_name[binding.body])
        elsewhere = {path[0] for path in binding.path_fields if len(path) == 1}
        schema = self._object(request, (field for field in request.fields if field not in elsewhere))
        return schema | {"additionalProperties": False}

    def _answer(self, message: Descriptor, *, is_stream: bool) -> Json:
        schema = self._message(message)
        if not is_stream:
            return {"description": "It went well.", "content": {"application/json": {"schema": schema}}}
        line = {
            "type": "object",
            "properties": {"result": schema, "error": {"$ref": "#/components/schemas/google.rpc.Status"}},
        }
        content = {streams.LINES.media_type: {"schema": line}, streams.EVENTS.media_type: {"schema": schema}}
        return {"description": _STREAM, "content": content}

    def _field(self, field: FieldDescriptor) -> Json:
        if entry := proto_json.map_entry(field):
            return {"type": "object", "additionalProperties": self._value(entry.fields_by_name["value"])}
        value = self._value(field)
        return {"type": "array", "items": value} if field.is_repeated else value

    def _value(self, field: FieldDescriptor) -> Json:
        if field.message_type:
            return self._message(field.message_type)
        if field.enum_type:
            return self._enum(field.enum_type)
        return _BYTES if field.type == FieldDescriptor.TYPE_BYTES else _SCALARS[field.cpp_type]

    def _message(self, message: Descriptor) -> Json:
        if message.full_name in proto_json.WRAPPERS:
            return self._value(message.fields_by_name["value"])
        if message.full_name in _WELL_KNOWN:
            return _WELL_KNOWN[message.full_name]
        name = _schema_name(message)
        if name not in self.schemas:
            self.schemas[name] = {}  # a message may hold itself
            self.schemas[name] = self._object(message, message.fields)
        return {"$ref": f"#/components/schemas/{name}"}

    def _object(self, message: Descriptor, fields: Iterable[FieldDescriptor]) -> Json:
        properties = {field.json_name: self._field(field) | {"description": self._comment(field)} for field in fields}
        return {"type": "object", "description": self._comment(message), "properties": properties}

    def _enum(self, enum: EnumDescriptor) -> Json:
        name = _schema_name(enum)
        values = [f"- `{it.name}`: {self._comments.get(f'{enum.full_name}.{it.name}', '')}" for it in enum.values]
        self.schemas[name] = {
            "type": "string",
            "enum": [value.name for value in enum.values],
            "description": "\n".join([self._comment(enum), "", *values]),
        }
        return {"$ref": f"#/components/schemas/{name}"}

    def _comment(self, of: Descriptor | EnumDescriptor | FieldDescriptor) -> str:
        return self._comments.get(of.full_name, "")


def _schema_name(of: Descriptor | EnumDescriptor) -> str:
    return of.full_name.removeprefix(f"{API_PACKAGE}.")
