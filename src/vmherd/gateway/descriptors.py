"""What the gateway knows of the API: methods, HTTP rules and comments, all from the descriptor set of the build."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

# Importing annotations_pb2 registers the google.api.http option, which parsing would otherwise skip.
from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodOptions,
)
from google.protobuf.descriptor_pool import DescriptorPool

API_PACKAGE = "vmherd.api.v1"


@dataclass(frozen=True)
class Method:
    """One RPC and its HTTP rules: the annotation itself, then its additional bindings."""

    descriptor: MethodDescriptor
    rules: tuple[http_pb2.HttpRule, ...]


@dataclass(frozen=True)
class Api:
    """The RPCs of one package, the pool that holds their types, and every comment by the full name of what it is on."""

    pool: DescriptorPool
    methods: tuple[Method, ...] = field(repr=False)
    comments: Mapping[str, str] = field(repr=False)


def built_in() -> FileDescriptorSet:
    """The descriptor set that the build made of all protos."""
    file = importlib.resources.files("vmherd.api").joinpath("descriptors.binpb")
    return FileDescriptorSet.FromString(file.read_bytes())


def load(files: FileDescriptorSet, package: str = API_PACKAGE) -> Api:
    """Reads a descriptor set whose files come after those that they import, as protoc writes them."""
    pool = DescriptorPool()
    methods: list[Method] = []
    comments: dict[str, str] = {}
    for file in files.file:
        stripped = FileDescriptorProto()
        stripped.CopyFrom(file)
        stripped.ClearField("source_code_info")
        pool.AddSerializedFile(stripped.SerializeToString())
        if file.package == package:
            methods.extend(_methods(pool, file))
        comments.update(_comments(file))
    return Api(pool, tuple(methods), comments)


def _methods(pool: DescriptorPool, file: FileDescriptorProto) -> Iterator[Method]:
    for service in file.service:
        descriptor = pool.FindServiceByName(f"{file.package}.{service.name}")
        for method in service.method:
            yield Method(descriptor.methods_by_name[method.name], _rules(method.options))


def _rules(options: MethodOptions) -> tuple[http_pb2.HttpRule, ...]:
    if not options.HasExtension(annotations_pb2.http):
        return ()
    rule: http_pb2.HttpRule = options.Extensions[annotations_pb2.http]
    return (rule, *rule.additional_bindings)


def _comments(file: FileDescriptorProto) -> dict[str, str]:
    names = dict(_names(file))
    return {
        names[path]: "\n".join(line.removeprefix(" ") for line in location.leading_comments.splitlines()).strip()
        for location in file.source_code_info.location
        if location.leading_comments and (path := tuple(location.path)) in names
    }


Path = tuple[int, ...]
"""Field numbers and indexes that lead from a FileDescriptorProto to an element, as `SourceCodeInfo` writes them."""


def _names(file: FileDescriptorProto) -> Iterator[tuple[Path, str]]:
    numbers = file.DESCRIPTOR.fields_by_name
    for index, message in enumerate(file.message_type):
        yield from _message_names(message, (numbers["message_type"].number, index), file.package)
    for index, enum in enumerate(file.enum_type):
        yield from _enum_names(enum, (numbers["enum_type"].number, index), file.package)
    for index, service in enumerate(file.service):
        path, name = (numbers["service"].number, index), f"{file.package}.{service.name}"
        yield path, name
        number = service.DESCRIPTOR.fields_by_name["method"].number
        yield from (((*path, number, at), f"{name}.{method.name}") for at, method in enumerate(service.method))


def _message_names(message: DescriptorProto, path: Path, scope: str) -> Iterator[tuple[Path, str]]:
    numbers = message.DESCRIPTOR.fields_by_name
    name = f"{scope}.{message.name}"
    yield path, name
    for index, member in enumerate(message.field):
        yield (*path, numbers["field"].number, index), f"{name}.{member.name}"
    for index, nested in enumerate(message.nested_type):
        yield from _message_names(nested, (*path, numbers["nested_type"].number, index), name)
    for index, enum in enumerate(message.enum_type):
        yield from _enum_names(enum, (*path, numbers["enum_type"].number, index), name)


def _enum_names(enum: EnumDescriptorProto, path: Path, scope: str) -> Iterator[tuple[Path, str]]:
    number = enum.DESCRIPTOR.fields_by_name["value"].number
    name = f"{scope}.{enum.name}"
    yield path, name
    yield from (((*path, number, index), f"{name}.{value.name}") for index, value in enumerate(enum.value))
