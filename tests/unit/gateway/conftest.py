"""An API of the tests' own, compiled as the build compiles vmherd's."""

from __future__ import annotations

from pathlib import Path

import grpc_tools
import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

from vmherd.gateway import descriptors, transcoder
from vmherd.gateway.descriptors import Api
from vmherd.gateway.transcoder import Binding

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Api:
    """The API of zoo.proto."""
    compiled = tmp_path_factory.mktemp("zoo") / "zoo.binpb"
    annotations = Path(annotations_pb2.__file__).parents[2]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [f"-I{HERE}", f"-I{annotations}", f"-I{well_known}", f"--descriptor_set_out={compiled}"]
    code = protoc.main(["protoc", *arguments, "--include_imports", "--include_source_info", "zoo.proto"])
    assert code == 0
    return descriptors.load(FileDescriptorSet.FromString(compiled.read_bytes()), "vmherd.test.zoo")


@pytest.fixture(scope="session")
def zoo_bindings(zoo: Api) -> dict[str, Binding]:
    """The bindings of the zoo by their HTTP method and template."""
    return {f"{binding.http_method} {binding.template.text}": binding for binding in transcoder.bindings(zoo)}


@pytest.fixture(scope="session")
def api() -> Api:
    """vmherd's own API."""
    return descriptors.load(descriptors.built_in())
