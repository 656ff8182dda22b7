"""Single calls through HTTP and gRPC: what reaches the controller, and what comes back."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.json_format import MessageToDict
from google.rpc.error_details_pb2 import ErrorInfo

from tests.integration.gateway import raw
from tests.integration.gateway.conftest import DEADLINE_S
from tests.integration.gateway.peer import Context, Peer
from vmherd.api.v1.controller_pb2 import (
    DeleteRequest,
    InfoRequest,
    LaunchRequest,
    ListNetworksRequest,
    ListNetworksResponse,
    ListRequest,
    ListResponse,
    Network,
    PlanRequest,
    PlanResponse,
    StopRequest,
    UpdateRequest,
)
from vmherd.api.v1.instance_pb2 import Address, Hardware, Instance, Nic, PortForward
from vmherd.gateway import descriptors, routes, transcoder
from vmherd.gateway.errors import HTTP_CODES
from vmherd.model import errors
from vmherd.model.errors import FieldViolation, VmherdError
from vmherd.rpc.status import CODES, to_status

pytestmark = pytest.mark.anyio

LAN = Network(name="lan", bridge="br0", subnet="10.20.30.0/24", gateway="10.20.30.1", isolated=True)
ON_NETWORKS = Instance(
    name="web",
    nics=[Nic(network="lan", mac="52:54:00:00:00:01"), Nic(network="user", forwards=[PortForward(guest_port=22)])],
    addresses=[Address(address="10.20.30.9", prefix_length=24, source=Address.LEASE)],
    autostart=True,
)
WEB = Instance(name="web", state=Instance.RUNNING, revision=2**53 + 1, labels={"a": "b"})


@pytest.mark.parametrize(
    ("method", "path", "body", "rpc", "request_", "answer"),
    [
        (
            "POST",
            "/v1/instances",
            {"name": "web", "hardware": {"memory_mib": 512}, "start": False, "labels": {"a": "b"}, "requestId": "r"},
            "Launch",
            LaunchRequest(
                name="web", hardware=Hardware(memory_mib=512), start=False, labels={"a": "b"}, request_id="r"
            ),
            WEB,
        ),
        ("GET", "/v1/instances/web", None, "Info", InfoRequest(name="web"), WEB),
        ("GET", "/v1/instances/a%2Fb%2520c", None, "Info", InfoRequest(name="a/b%20c"), WEB),
        ("GET", "/v1/instances/web:start", None, "Info", InfoRequest(name="web:start"), WEB),
        ("POST", "/v1/instances/web/stop", None, "Stop", StopRequest(name="web"), WEB),
        ("POST", "/v1/instances/web/stop", {"force": True}, "Stop", StopRequest(name="web", force=True), WEB),
        ("DELETE", "/v1/instances/web?force=true", None, "Delete", DeleteRequest(name="web", force=True), Empty()),
        (
            "GET",
            "/v1/instances?pageSize=7&label_selector=a%3Db&labelSelector=c",
            None,
            "List",
            ListRequest(page_size=7, label_selector=["a=b", "c"]),
            ListResponse(instances=[WEB], revision=9),
        ),
        ("PATCH", "/v1/instances/web", {"autostart": True}, "Update", UpdateRequest(name="web", autostart=True), WEB),
        ("PATCH", "/v1/instances/web", {"autostart": False}, "Update", UpdateRequest(name="web", autostart=False), WEB),
        ("PATCH", "/v1/instances/web", {}, "Update", UpdateRequest(name="web"), WEB),
        ("GET", "/v1/networks", None, "ListNetworks", ListNetworksRequest(), ListNetworksResponse(networks=[LAN])),
        (
            "POST",
            "/v1/instances",
            {
                "name": "web",
                "nics": [
                    {"network": "lan", "mac": "52:54:00:00:00:01", "ipv4Address": "10.20.30.9"},
                    {
                        "network": "user",
                        "forwards": [{"guestPort": 22}, {"protocol": "UDP", "guestPort": 53, "hostPort": 54}],
                    },
                ],
                "autostart": True,
            },
            "Launch",
            LaunchRequest(
                name="web",
                nics=[
                    Nic(network="lan", mac="52:54:00:00:00:01", ipv4_address="10.20.30.9"),
                    Nic(
                        network="user",
                        forwards=[
                            PortForward(guest_port=22),
                            PortForward(protocol=PortForward.UDP, guest_port=53, host_port=54),
                        ],
                    ),
                ],
                autostart=True,
            ),
            ON_NETWORKS,
        ),
        (
            "POST",
            "/v1/instances:plan",
            {"name": "web"},
            "Plan",
            PlanRequest(launch=LaunchRequest(name="web")),
            PlanResponse(argv=["qemu", "-m"]),
        ),
    ],
)
async def test_requests_and_answers(
    http: httpx.AsyncClient, peer: Peer, method: str, path: str, body: Any, rpc: str, request_: Any, answer: Any
) -> None:
    peer.answers[rpc] = answer
    response = await http.request(method, path, json=body)
    assert peer.requests == [request_]
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert "server" not in response.headers
    assert response.json() == MessageToDict(answer, always_print_fields_with_no_presence=True)


async def test_zero_values_are_printed(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Info"] = Instance()
    value = (await http.get("/v1/instances/web")).json()
    assert (value["state"], value["generation"], value["revision"]) == ("STATE_UNSPECIFIED", 0, "0")
    assert (value["labels"], value["addresses"]) == ({}, [])


async def test_networks_in_json(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Info"] = ON_NETWORKS
    value = (await http.get("/v1/instances/web")).json()
    assert value["autostart"] is True
    assert value["addresses"][0]["source"] == "LEASE"
    assert value["nics"][0] == {
        "network": "lan",
        "mac": "52:54:00:00:00:01",
        "ipv4Address": "",
        "ipv6Address": "",
        "forwards": [],
    }
    assert value["nics"][1]["forwards"] == [{"protocol": "PROTOCOL_UNSPECIFIED", "guestPort": 22, "hostPort": 0}]


@pytest.mark.parametrize(
    ("nics", "field"),
    [
        ({}, "nics: expected"),
        ([{"forwards": [{"guestPort": -1}]}], "nics[0].forwards[0].guest_port: expected"),
        ([{}, {"forwards": [{"protocol": "SCTP"}]}], "nics[1].forwards[0].protocol: expected"),
        ([{"bridge": "br0"}], "nics[0].bridge: there is no such field"),
    ],
)
async def test_a_network_interface_that_is_none(http: httpx.AsyncClient, peer: Peer, nics: Any, field: str) -> None:
    response = await http.post("/v1/instances", json={"name": "web", "nics": nics})
    assert response.status_code == 400
    assert field in response.json()["message"]
    assert peer.requests == []


async def test_every_rpc_has_a_route(http: httpx.AsyncClient, peer: Peer) -> None:
    for binding in transcoder.bindings(descriptors.load(descriptors.built_in())):
        path = binding.template.text.replace("{name}", "web")
        response = await http.request(binding.http_method, path)
        assert response.status_code == 501, path  # it reached the peer, which has no answer


async def test_head_is_get_without_a_body(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Info"] = WEB
    response = await http.head("/v1/instances/web")
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) == len((await http.get("/v1/instances/web")).content)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/instances", "GET, HEAD, POST"),
        ("PUT", "/v1/instances/web", "DELETE, GET, HEAD, PATCH"),
        ("GET", "/v1/instances/web/start", "POST"),
        ("HEAD", "/v1/watch", "GET"),
        ("POST", "/healthz", "GET, HEAD"),
    ],
)
async def test_other_methods_are_told_which_are_allowed(
    http: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    response = await http.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        assert response.json()["details"][0]["reason"] == "METHOD_NOT_ALLOWED"


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/instances/", "/v1//instances", "/v1/instances/a/b", "/v2/instances", "/docs/other", "/%00"],
)
async def test_where_there_is_nothing(http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(path)
    assert response.status_code == 404
    assert (response.json()["code"], response.json()["details"][0]["reason"]) == (5, "ROUTE_NOT_FOUND")


ERRORS = [
    errors.InvalidArgument.of([FieldViolation("hardware.cpus", "must be at least 1")]),
    errors.OutOfRange("compacted"),
    errors.instance_not_found("web"),
    errors.name_taken("web"),
    errors.Unauthenticated("who?"),
    errors.PermissionDenied("no"),
    errors.Unimplemented("cannot"),
    errors.illegal_transition("web", "start", "RUNNING", ["STOPPED"]),
    errors.ResourceExhausted("full"),
    errors.Aborted("failed in the guest", metadata={"name": "web"}),
    errors.Unavailable("the helper is away", retry_delay_s=2.5),
    errors.DeadlineExceeded("the guest agent is silent"),
    errors.InternalError("defect", metadata={"incident_id": "1"}),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_errors_of_the_controller(http: httpx.AsyncClient, peer: Peer, error: VmherdError) -> None:
    peer.answers["Info"] = error
    response = await http.get("/v1/instances/web")
    assert response.status_code == HTTP_CODES[CODES[type(error)]]
    status = MessageToDict(to_status(error), always_print_fields_with_no_presence=True)
    assert response.json() == status
    assert response.headers.get("retry-after") == ("3" if isinstance(error, errors.Unavailable) else None)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_errors_without_details_get_a_reason(http: httpx.AsyncClient, peer: Peer, code: grpc.StatusCode) -> None:
    async def abort(_request: Any, context: Context) -> None:
        await context.abort(code, "no")

    peer.answers["Info"] = abort
    response = await http.get("/v1/instances/web")
    assert response.status_code == HTTP_CODES[code]
    value = response.json()
    assert value["code"] == code.value[0]
    assert value["details"][0]["@type"] == f"type.googleapis.com/{ErrorInfo.DESCRIPTOR.full_name}"
    of_the_connection = {
        grpc.StatusCode.UNAVAILABLE: "CONTROLLER_UNREACHABLE",
        grpc.StatusCode.DEADLINE_EXCEEDED: "GRPC_TIMEOUT",
    }
    assert value["details"][0]["reason"] == of_the_connection.get(code, code.name)


async def test_an_answer_that_is_no_json_is_a_defect_without_a_text(http: httpx.AsyncClient, peer: Peer) -> None:
    instance = Instance(name="web")
    instance.create_time.seconds = 2**62  # a year that no timestamp can tell
    peer.answers["Info"] = instance
    response = await http.get("/v1/instances/web")
    assert response.status_code == 500
    assert response.json()["message"].startswith("internal error; the log has the details under incident id ")


async def test_a_timeout_reaches_the_controller(http: httpx.AsyncClient, peer: Peer) -> None:
    left_s: list[float | None] = []

    async def measure(_request: Any, context: Context) -> Instance:
        left_s.append(context.time_remaining())
        return WEB

    peer.answers["Info"] = measure
    assert (await http.get("/v1/instances/web", headers={"Grpc-Timeout": "60S"})).status_code == 200
    assert (await http.get("/v1/instances/web")).status_code == 200
    with_header_s, without_s = left_s
    assert with_header_s is not None
    assert 50 < with_header_s < 70
    assert without_s is None, "the controller could not tell the gateway's limit from a caller's wish"


async def test_a_call_without_a_timeout_has_a_limit(
    http: httpx.AsyncClient, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "CALL_TIMEOUT_S", 0.05)
    peer.answers["Info"] = peer.hang
    response = await http.get("/v1/instances/web")
    assert response.status_code == 504
    assert response.json()["details"][0]["reason"] == "GATEWAY_TIMEOUT"
    assert "outcome unknown" in response.json()["message"]
    async with asyncio.timeout(DEADLINE_S):
        await peer.was_cancelled.wait()


async def test_time_is_up(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Info"] = peer.hang
    response = await http.get("/v1/instances/web", headers={"Grpc-Timeout": "50m"})
    assert response.status_code == 504
    assert response.json()["details"][0]["reason"] == "GRPC_TIMEOUT"
    async with asyncio.timeout(DEADLINE_S):
        await peer.was_cancelled.wait()


@pytest.mark.parametrize("text", ["", "5", "S", "5s", "-5S", "1.5S", "123456789S", "5S ,", "٣S"])
async def test_a_timeout_that_is_none(http: httpx.AsyncClient, peer: Peer, text: str) -> None:
    response = await http.get("/v1/instances/web", headers={b"Grpc-Timeout": text.encode()})
    assert response.status_code == 400
    assert response.json()["details"][0]["reason"] == "MALFORMED_TIMEOUT"
    assert peer.requests == []


@pytest.mark.parametrize("text", ["99999999H", "1M", "99999999u"])
async def test_timeouts_of_all_sizes(http: httpx.AsyncClient, peer: Peer, text: str) -> None:
    peer.answers["Info"] = WEB
    assert (await http.get("/v1/instances/web", headers={"Grpc-Timeout": text})).status_code == 200


async def test_a_client_that_goes_away_cancels_the_call(gateway: str, peer: Peer) -> None:
    peer.answers["Info"] = peer.hang
    async with asyncio.timeout(DEADLINE_S):
        async with raw.connected(gateway) as (_, writer):
            writer.write(raw.head("GET", "/v1/instances/web", gateway))
            await peer.began.wait()
        await peer.was_cancelled.wait()


async def test_many_calls_at_once_do_not_wait_for_each_other(http: httpx.AsyncClient, peer: Peer) -> None:
    peer.answers["Info"] = peer.hang
    peer.answers["List"] = ListResponse()
    slow = asyncio.create_task(http.get("/v1/instances/web"))
    async with asyncio.timeout(DEADLINE_S):
        await peer.began.wait()
        answers = await asyncio.gather(*(http.get("/v1/instances") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert not slow.done()
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)


async def test_no_answer_waits_for_an_acknowledgement(http: httpx.AsyncClient) -> None:
    took = [(await http.get("/healthz")).elapsed for _ in range(60)]
    quick = [each for each in took if each < timedelta(milliseconds=40)]  # which Linux delays an acknowledgement by
    assert len(quick) > 30
