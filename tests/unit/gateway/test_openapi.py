"""The description of the HTTP API: complete, commented, and such that every reference leads somewhere."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from vmherd.gateway import openapi, transcoder
from vmherd.gateway.descriptors import Api

WITHOUT_ROUTE = {"Exec"}
"""HTTP has no stream in both directions."""


@pytest.fixture(scope="module")
def document(api: Api) -> dict[str, Any]:
    """vmherd's own."""
    return openapi.document(api, transcoder.bindings(api), needs_token=True)


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def test_every_rpc_with_an_annotation_has_a_route_and_a_comment(api: Api, document: dict[str, Any]) -> None:
    described = {operation["operationId"]: operation for operation in operations(document).values()}
    annotated = [method for method in api.methods if method.rules]
    assert annotated
    for method in annotated:
        service, name = method.descriptor.containing_service.name, method.descriptor.name
        operation = described[f"{service}_{name}"]
        assert operation["description"] == api.comments[f"vmherd.api.v1.{service}.{name}"]
        assert operation["summary"]
    assert all(tag["description"] for tag in document["tags"])


def test_everything_has_a_comment(api: Api, document: dict[str, Any]) -> None:
    bare = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, value in schema.get("properties", {}).items()
        if not value["description"]
    ]
    bare += [name for name, schema in document["components"]["schemas"].items() if not schema["description"]]
    bare += [
        f"{route} {parameter['name']}"
        for route, operation in operations(document).items()
        for parameter in operation["parameters"]
        if "$ref" not in parameter and not parameter["description"]
    ]
    assert bare == []


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"#/components/(\w+)/([^"]+)"', json.dumps(document)))
    assert references
    assert [it for it in references if it[1] not in document["components"][it[0]]] == []


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(ids) == len(set(ids))


def test_path_parameters_are_those_of_the_path(document: dict[str, Any]) -> None:
    for route, operation in operations(document).items():
        in_path = [it["name"] for it in operation["parameters"] if it.get("in") == "path"]
        assert in_path == re.findall(r"\{([^}]+)\}", route)


def test_the_body_leaves_out_what_the_path_gives(document: dict[str, Any]) -> None:
    body = document["paths"]["/v1/instances/{name}/stop"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert set(body["properties"]) == {"force", "grace", "requestId"}
    plan = document["paths"]["/v1/instances:plan"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert plan == {"$ref": "#/components/schemas/LaunchRequest"}
    assert "requestBody" not in document["paths"]["/v1/instances/{name}"]["delete"]


def test_networks_are_described(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    launch = document["paths"]["/v1/instances"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert launch["properties"]["nics"]["items"] == {"$ref": "#/components/schemas/Nic"}
    assert set(schemas["Nic"]["properties"]) == {"network", "mac", "ipv4Address", "ipv6Address", "forwards"}
    assert schemas["PortForward.Protocol"]["enum"] == ["PROTOCOL_UNSPECIFIED", "TCP", "UDP"]
    assert "LEASE" in schemas["Address.Source"]["enum"]
    update = document["paths"]["/v1/instances/{name}"]["patch"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(update["properties"]) == {"autostart"}
    assert "get" in document["paths"]["/v1/networks"]


def test_query_parameters(document: dict[str, Any]) -> None:
    parameters = document["paths"]["/v1/instances"]["get"]["parameters"]
    by_name = {it["name"]: it for it in parameters if "name" in it}
    assert by_name["labelSelector"]["schema"] == {"type": "array", "items": {"type": "string"}}
    assert by_name["pageSize"]["schema"]["maximum"] == 2**32 - 1
    assert {it["in"] for it in by_name.values()} == {"query"}


def test_files_are_plain_bytes(document: dict[str, Any]) -> None:
    files = document["paths"]["/v1/instances/{name}/files"]
    assert set(files) == {"get", "head", "put"}
    assert set(files["get"]["responses"]["200"]["content"]) == {"application/octet-stream", "application/x-tar"}
    assert set(files["put"]["requestBody"]["content"]) == {"*/*"}
    answer = files["put"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/WriteFileResponse"}


def test_streams_have_both_forms(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/watch"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"application/x-ndjson", "text/event-stream"}


def test_types(document: dict[str, Any]) -> None:
    instance = document["components"]["schemas"]["Instance"]["properties"]
    assert instance["revision"]["type"] == "string"
    assert instance["createTime"]["format"] == "date-time"
    assert instance["labels"]["additionalProperties"] == {"type": "string"}
    assert instance["addresses"]["items"] == {"$ref": "#/components/schemas/Address"}
    assert "RUNNING" in document["components"]["schemas"]["Instance.State"]["enum"]
    assert (
        "- `RUNNING`: The virtual machine executes."
        in document["components"]["schemas"]["Instance.State"]["description"]
    )


def test_the_token_is_described_where_it_is_needed(api: Api, document: dict[str, Any]) -> None:
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}
    opened = openapi.document(api, transcoder.bindings(api), needs_token=False)
    assert opened["security"] == []
    assert "securitySchemes" not in opened["components"]


def test_any_api_can_be_described(zoo: Api) -> None:
    document = openapi.document(zoo, transcoder.bindings(zoo), needs_token=False)
    assert set(document["paths"]["/v1/zoos"]) == {"get", "post"}
    assert document["paths"]["/v1/zoos"]["post"]["operationId"] == "ZooService_Put_2"
    animal = document["components"]["schemas"]["vmherd.test.zoo.Animal"]["properties"]
    assert animal["child"]["$ref"] == "#/components/schemas/vmherd.test.zoo.Animal"
    assert not any("Hidden" in operation["operationId"] for operation in operations(document).values())
