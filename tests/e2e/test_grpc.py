"""The controller's gRPC for everyone: clients that know nothing of vmherd, on the unix socket and on TCP."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.framework.gate import Gate
from tests.framework.herd import AT_ONCE_S, HerdUnderTest
from tests.framework.idle_kernel import idle_kernel
from tests.framework.refusals import told
from vmherd.api.v1.controller_pb2 import LaunchRequest, WatchResponse
from vmherd.api.v1.controller_pb2_grpc import ControllerServiceStub
from vmherd.api.v1.instance_pb2 import Instance
from vmherd.rpc.status import status_of

CONTROLLER = "vmherd.api.v1.ControllerService"
GUEST = "vmherd.api.v1.GuestService"
PROCESS = "vmherd.api.v1.ProcessService"
FILE = "vmherd.api.v1.FileService"
CALL_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    """A herd with one instance that runs without an agent."""
    shared_herd.add_image("idle", idle_kernel())
    shared_herd.launch("idle", image="idle", until="QMP")
    return shared_herd


@pytest.fixture(scope="module")
def gate(herd: HerdUnderTest) -> Gate:
    return Gate(herd)


@pytest.fixture(params=["unix", "tcp"])
def channel(request: pytest.FixtureRequest, herd: HerdUnderTest) -> Iterator[grpc.Channel]:
    """A channel to the controller; on TCP one that shows the token."""
    with unix_channel(herd) if request.param == "unix" else tcp_channel(herd) as opened:
        yield opened


def unix_channel(herd: HerdUnderTest) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{herd.files.controller_socket}")


def tcp_channel(herd: HerdUnderTest) -> grpc.Channel:
    local = grpc.local_channel_credentials(grpc.LocalConnectionType.LOCAL_TCP)
    return grpc.secure_channel(
        herd.grpc_address, grpc.composite_channel_credentials(local, grpc.access_token_call_credentials(herd.token))
    )


class Generic:
    """A client that has all it knows of the server from the server's reflection."""

    def __init__(self, channel: grpc.Channel, *, known: grpc.Channel | None = None) -> None:
        self._channel = channel
        self._pool = DescriptorPool(ProtoReflectionDescriptorDatabase(known or channel))

    def method(self, service: str, name: str) -> MethodDescriptor:
        return self._pool.FindServiceByName(service).methods_by_name[name]

    def call(self, service: str, name: str, fields: dict[str, Any], **options: Any) -> Any:
        """Starts a call: gives its answer, or the iterator of its answers."""
        method = self.method(service, name)
        shape = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        multi_callable = shape(
            f"/{service}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        request = json_format.ParseDict(fields, GetMessageClass(method.input_type)())
        return multi_callable(request, **({"timeout": CALL_TIMEOUT_S} | options))


def error_of(call: Callable[[], Any]) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """The code that a call ends with, and its status."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call():
            pass
    error: Any = caught.value
    return error.code(), json_format.MessageToDict(status_of(error))


def test_it_is_healthy(channel: grpc.Channel) -> None:
    health = HealthStub(channel)
    for service in ("", CONTROLLER, GUEST, PROCESS, FILE):
        answer = health.Check(HealthCheckRequest(service=service), timeout=CALL_TIMEOUT_S)
        assert answer.status == HealthCheckResponse.SERVING
    code, _ = error_of(partial(health.Check, HealthCheckRequest(service="nosuch"), timeout=CALL_TIMEOUT_S))
    assert code is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert set(services) == {
        CONTROLLER,
        GUEST,
        PROCESS,
        FILE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_a_client_that_knows_only_reflection(channel: grpc.Channel) -> None:
    generic = Generic(channel)
    launched = generic.call(CONTROLLER, "Launch", {"name": "web", "image": "idle", "start": False})
    listed = generic.call(CONTROLLER, "List", {})
    assert [instance.name for instance in listed.instances] == ["idle", "web"]
    watch = generic.call(CONTROLLER, "Watch", {"name": "web"})
    assert next(watch).instance.uid == launched.uid
    watch.cancel()
    [progress] = generic.call(CONTROLLER, "Wait", {"name": "web", "until": "STOPPED"})
    assert progress.instance == launched
    generic.call(CONTROLLER, "Delete", {"name": "web"})
    code, status = error_of(partial(generic.call, CONTROLLER, "Info", {"name": "web"}))
    assert code is grpc.StatusCode.NOT_FOUND
    told(status, "NOT_FOUND", "INSTANCE_NOT_FOUND", "no instance is called 'web'")
    code, status = error_of(partial(generic.call, GUEST, "Ping", {"name": "idle"}))
    assert code is grpc.StatusCode.UNAVAILABLE
    told(status, "UNAVAILABLE", "AGENT_NOT_RUNNING", "no agent in the guest")


@pytest.mark.parametrize("shown", ["", "Bearer wrong", "Bearer ", "Basic {token}", "{token}"])
def test_tcp_needs_the_token(herd: HerdUnderTest, shown: str) -> None:
    metadata = (("authorization", shown.format(token=herd.token)),) if shown else ()
    before = herd.store_revision(), herd.fingerprint()
    with unix_channel(herd) as known, grpc.insecure_channel(herd.grpc_address) as channel:
        stranger = Generic(channel, known=known)  # over TCP not even reflection answers
        for service, name, fields in (
            (CONTROLLER, "List", {}),
            (CONTROLLER, "Launch", {"name": "web", "image": "idle"}),
            (CONTROLLER, "Delete", {"name": "idle", "force": True}),
            (CONTROLLER, "Watch", {}),
            (PROCESS, "Run", {"name": "idle", "command": ["true"]}),
        ):
            code, status = error_of(partial(stranger.call, service, name, fields, metadata=metadata))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            told(status, "UNAUTHENTICATED", "TOKEN_NEEDED", "authorization: Bearer TOKEN")
        code, _ = error_of(
            partial(HealthStub(channel).Check, HealthCheckRequest(), timeout=CALL_TIMEOUT_S, metadata=metadata)
        )
        assert code is grpc.StatusCode.UNAUTHENTICATED
        code, _ = error_of(ProtoReflectionDescriptorDatabase(channel).get_services)
        assert code is grpc.StatusCode.UNAUTHENTICATED
    assert (herd.store_revision(), herd.fingerprint()) == before


def buf_curl(herd: HerdUnderTest, over: str, method: str, fields: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    where = {
        "unix": ["--unix-socket", str(herd.files.controller_socket)],
        "tcp": [
            *("--header", f"Authorization: Bearer {herd.token}"),
            *("--reflect-header", f"Authorization: Bearer {herd.token}"),
        ],
    }
    host = herd.grpc_address if over == "tcp" else "localhost"
    return subprocess.run(
        [
            *(Path(sys.executable).with_name("buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge"),
            *(*where[over], "--data", json.dumps(fields), f"http://{host}/{method}"),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_buf_curl(herd: HerdUnderTest, over: str) -> None:
    asked = buf_curl(herd, over, f"{CONTROLLER}/Info", {"name": "idle"})
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["uid"] == herd.info("idle")["uid"]
    refused = buf_curl(herd, over, f"{CONTROLLER}/Info", {"name": "nobody"})
    assert refused.returncode != 0
    status = json.loads(refused.stderr)
    assert (status["code"], status["message"].partition(";")[0]) == ("not_found", "no instance is called 'nobody'")


@pytest.mark.parametrize(("name", "fields"), [("Wait", {"name": "idle"}), ("Watch", {})])
def test_a_deadline_is_kept(channel: grpc.Channel, name: str, fields: dict[str, Any]) -> None:
    generic = Generic(channel)
    generic.method(CONTROLLER, name)  # what reflection takes is not the call's
    started_s = time.monotonic()
    code, _ = error_of(partial(generic.call, CONTROLLER, name, fields, timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.25 < time.monotonic() - started_s < AT_ONCE_S


def test_a_deadline_over_http_is_kept(herd: HerdUnderTest) -> None:
    response = herd.http.get("/v1/instances/idle/wait", headers={"Grpc-Timeout": "2S"})
    assert response.elapsed.total_seconds() < AT_ONCE_S
    last = json.loads(response.text.splitlines()[-1])
    told(last["error"], "DEADLINE_EXCEEDED", "GRPC_TIMEOUT", "time was up")


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_a_launch_whose_caller_goes_away_is_carried_out(herd: HerdUnderTest, gate: Gate, how: str) -> None:
    with unix_channel(herd) as channel, gate.closed():
        watch = Generic(channel).call(CONTROLLER, "Watch", {"name": "web"})
        assert next(watch).kind == WatchResponse.SYNCED
        launch = ControllerServiceStub(channel).Launch.future(
            LaunchRequest(name="web", image="idle"), timeout=5 if how == "deadline" else CALL_TIMEOUT_S
        )
        assert next(watch).instance.state == Instance.STARTING
        if how == "cancel":
            launch.cancel()
        assert launch.code() is (grpc.StatusCode.DEADLINE_EXCEEDED if how == "deadline" else grpc.StatusCode.CANCELLED)
        assert herd.info("web")["state"] == "STARTING"
    instance = herd.wait("web", "QMP")
    assert (instance["state"], instance["generation"]) == ("RUNNING", 1)
    assert herd.http.delete("/v1/instances/web", params={"force": True}).status_code == 200


def test_streams_end_when_the_controller_does(herd: HerdUnderTest) -> None:
    with unix_channel(herd) as unix, tcp_channel(herd) as tcp, ThreadPoolExecutor() as pool:
        streams = []
        for channel in (unix, tcp):
            for name, fields in (("Watch", {}), ("Wait", {"name": "idle"})):
                streams.append(Generic(channel).call(CONTROLLER, name, fields, timeout=None))
                next(streams[-1])
        over_http = herd.stream("/v1/watch")
        next(over_http)
        errors = [pool.submit(error_of, lambda stream=stream: stream) for stream in streams]
        started_s = time.monotonic()
        herd.end("controller")
        assert time.monotonic() - started_s < AT_ONCE_S
        *_, last = over_http
        statuses = [last["error"], *(error.result()[1] for error in errors)]
        assert {status["code"] for status in statuses} == {grpc.StatusCode.UNAVAILABLE.value[0]}
        # A connection that breaks before its last words were read leaves its client to say why.
        reasons = {detail["reason"] for status in statuses for detail in status["details"] if "reason" in detail}
        assert "SHUTTING_DOWN" in reasons
        assert reasons <= {"SHUTTING_DOWN", "CONTROLLER_UNREACHABLE"}
    herd.start("controller")
    herd.wait_ready()
    assert herd.info("idle")["state"] == "RUNNING"
