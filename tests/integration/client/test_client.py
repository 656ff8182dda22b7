"""The client with a real gRPC server at the other end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.fake_controller import FakeController, fake_controller
from vmherd.api.v1.controller_pb2 import InfoRequest, LaunchRequest, WaitRequest
from vmherd.client import Client
from vmherd.model.errors import AlreadyExists, DeadlineExceeded, FieldViolation, InvalidArgument, NotFound, Unavailable

TIMEOUT_S = 60.0


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vh-", dir="/tmp") as directory:
        yield Path(directory) / "controller.sock"


@pytest.fixture
def controller(socket: Path) -> Iterator[FakeController]:
    with fake_controller(socket) as fake:
        yield fake


@pytest.fixture
def client(socket: Path, controller: FakeController) -> Iterator[Client]:
    with Client(socket) as client:
        yield client


def test_an_answer(client: Client) -> None:
    assert client.instances.Launch(LaunchRequest(name="a"), timeout=TIMEOUT_S).name == "a"


def test_an_error_keeps_reason_and_metadata(client: Client) -> None:
    with pytest.raises(NotFound) as raised:
        client.instances.Info(InfoRequest(name="nobody"), timeout=TIMEOUT_S)
    assert raised.value.reason == "INSTANCE_NOT_FOUND"
    assert raised.value.metadata == {"name": "nobody"}


def test_an_error_keeps_the_fields_it_is_about(client: Client, controller: FakeController) -> None:
    controller.errors["LaunchRequest"] = InvalidArgument.of([FieldViolation("name", "must be given")])
    with pytest.raises(InvalidArgument) as raised:
        client.instances.Launch(LaunchRequest(), timeout=TIMEOUT_S)
    assert raised.value.violations == (FieldViolation("name", "must be given"),)


def test_a_stream_gives_its_messages_and_then_its_error(client: Client, controller: FakeController) -> None:
    controller.add("a")
    request = WaitRequest(name="a", until=WaitRequest.QMP)
    assert [answer.waiting_for for answer in client.instances.Wait(request, timeout=TIMEOUT_S)] == [
        "the next rung",
        "the next rung",
        "",
    ]
    controller.errors["WaitRequest"] = DeadlineExceeded("time was up")
    with pytest.raises(DeadlineExceeded, match="time was up"):
        list(client.instances.Wait(request, timeout=TIMEOUT_S))


def test_pages_are_followed(client: Client, controller: FakeController) -> None:
    controller.page_size_max = 2
    for name in "abc":
        controller.add(name)
    assert [[instance.name for instance in page.instances] for page in client.pages()] == [["a", "b"], ["c"]]


def test_a_controller_that_comes_back_is_reached_again(socket: Path) -> None:
    with Client(socket) as client:
        with fake_controller(socket) as fake:
            fake.add("a")
            client.instances.Info(InfoRequest(name="a"), timeout=TIMEOUT_S)
        with pytest.raises(Unavailable):
            client.instances.Info(InfoRequest(name="a"), timeout=TIMEOUT_S)
        with fake_controller(socket) as fake:
            fake.add("a")
            answer = client.instances.Info(InfoRequest(name="a"), timeout=TIMEOUT_S, wait_for_ready=True)
            assert answer.name == "a"


@pytest.mark.parametrize(("make", "why"), [(False, "No such file or directory"), (True, "Connection refused")])
def test_nobody_there_says_where_and_why(socket: Path, make: bool, why: str) -> None:
    if make:
        socket.touch()
    with Client(socket) as client, pytest.raises(Unavailable, match=f"{socket}: {why};") as raised:
        client.instances.Info(InfoRequest(name="a"), timeout=TIMEOUT_S)
    assert raised.value.reason == "CONTROLLER_NOT_RUNNING"


def test_a_taken_name_is_an_error_of_its_own(client: Client, controller: FakeController) -> None:
    controller.add("a")
    with pytest.raises(AlreadyExists):
        client.instances.Launch(LaunchRequest(name="a"), timeout=TIMEOUT_S)
