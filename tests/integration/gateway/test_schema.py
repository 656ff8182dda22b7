"""The description against the gateway: requests made from it, right and wrong, and answers held against it."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import schemathesis
from google.protobuf.empty_pb2 import Empty
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks

from tests.integration.gateway.peer import Peer
from vmherd.api.v1.controller_pb2 import (
    ListNetworksResponse,
    ListResponse,
    Network,
    PlanResponse,
    WaitResponse,
    WatchResponse,
)
from vmherd.api.v1.instance_pb2 import Instance

pytestmark = pytest.mark.anyio

INSTANCE = Instance(name="web", state=Instance.RUNNING)


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
async def test_requests_made_from_the_description(
    http: httpx.AsyncClient, gateway: str, peer: Peer, mode: schemathesis.GenerationMode
) -> None:
    peer.answers = dict.fromkeys(
        ("Launch", "Start", "Stop", "Info", "Restart", "Pause", "Resume", "Update"), INSTANCE
    ) | {
        "List": ListResponse(instances=[INSTANCE]),
        "ListNetworks": ListNetworksResponse(networks=[Network(name="lan", bridge="br0")]),
        "Delete": Empty(),
        "Plan": PlanResponse(instance=INSTANCE),
        "Wait": peer.streaming(WaitResponse(instance=INSTANCE)),
        "Watch": peer.streaming(WatchResponse(instance=INSTANCE)),
    }
    description = schemathesis.openapi.from_dict((await http.get("/openapi.json")).json())
    description.validate()
    operations = [it.ok() for it in description.include(tag="ControllerService").get_all_operations()]
    assert len(operations) == 14
    await asyncio.to_thread(lambda: [try_out(it, f"http://{gateway}", mode) for it in operations])


# JSON from protobuf is more liberal than a schema can say: null is absent, "7" is a number. And an unknown field is
# refused, though the schema leaves room for what a later version adds to an answer.
NOT_CHECKED = [checks.negative_data_rejection, checks.positive_data_acceptance]


def try_out(operation: APIOperation, url: str, mode: schemathesis.GenerationMode) -> None:
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        case.headers.pop("Grpc-Timeout", None)  # time may really be up then
        case.call_and_validate(base_url=url, excluded_checks=NOT_CHECKED)

    try:
        run()
    except BaseExceptionGroup as failures:
        raise AssertionError(f"{operation.label}: {failures}") from failures
