"""Requests with a request id: however often they are sent, they are carried out once and answered the same."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.framework.gate import Gate
from tests.framework.herd import HerdUnderTest
from tests.framework.idle_kernel import idle_kernel
from tests.framework.refusals import refused

BEFORE = {"launch": None, "start": "STOPPED", "stop": "RUNNING", "restart": "RUNNING", "delete": "RUNNING"}
"""The verbs that take a request id, and the state of the instance that each is tried on."""

AFTER = {"launch": ("RUNNING", 1), "start": ("RUNNING", 1), "stop": ("STOPPED", 1), "restart": ("RUNNING", 2)}
"""The state and the generation that each leaves when it is carried out once."""


@pytest.fixture(scope="module")
def herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    shared_herd.add_image("idle", idle_kernel())
    shared_herd.add_image("broken", b"no kernel" * 1000)
    return shared_herd


@pytest.fixture(scope="module")
def gate(herd: HerdUnderTest) -> Gate:
    return Gate(herd)


@pytest.fixture(autouse=True)
def no_instances_left(herd: HerdUnderTest) -> Iterator[None]:
    yield
    herd.remove_instances()
    assert herd.fingerprint() == {"instances": [], "files": {}}


def prepare(herd: HerdUnderTest, verb: str) -> None:
    """Makes the instance, called like the verb, that it will be tried on."""
    if state := BEFORE[verb]:
        herd.launch(verb, image="idle", start=state == "RUNNING", until="")


def ask(herd: HerdUnderTest, verb: str, request_id: str) -> httpx.Response:
    path = f"/v1/instances/{verb}"
    match verb:
        case "launch":
            return herd.http.post("/v1/instances", json={"name": verb, "image": "idle", "requestId": request_id})
        case "start":
            return herd.http.post(f"{path}/start", json={"requestId": request_id})
        case "delete":
            return herd.http.delete(path, params={"force": True, "requestId": request_id})
        case _:
            return herd.http.post(f"{path}/{verb}", json={"force": True, "requestId": request_id})


def check_done_once(herd: HerdUnderTest, verb: str, answer: dict[str, Any]) -> None:
    if verb == "delete":
        assert herd.http.get(f"/v1/instances/{verb}").status_code == 404
        return
    assert (answer["state"], answer["generation"]) == AFTER[verb]
    now = herd.info(verb)
    assert (now["uid"], now["state"], now["generation"]) == (answer["uid"], *AFTER[verb])
    started = [line for line in herd.log("qemu").splitlines() if answer["uid"] in line and '"started"' in line]
    assert len(started) == now["generation"]


@pytest.mark.parametrize("verb", BEFORE)
def test_sent_again_after_it_was_done(herd: HerdUnderTest, verb: str) -> None:
    prepare(herd, verb)
    first = ask(herd, verb, f"again-{verb}")
    assert first.status_code == 200, first.text
    before = herd.store_revision(), herd.fingerprint()
    again = ask(herd, verb, f"again-{verb}")
    assert (again.status_code, again.json()) == (200, first.json())
    assert (herd.store_revision(), herd.fingerprint()) == before
    check_done_once(herd, verb, again.json())


@pytest.mark.parametrize("verb", BEFORE)
def test_ten_at_once(herd: HerdUnderTest, verb: str) -> None:
    prepare(herd, verb)
    together = threading.Barrier(10)

    def ask_together(_number: int) -> httpx.Response:
        together.wait(60)
        return ask(herd, verb, f"ten-{verb}")

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask_together, range(10)))
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    assert [answer.json() for answer in answers] == [answers[0].json()] * 10
    check_done_once(herd, verb, answers[0].json())


def test_sent_again_after_the_controller_was_killed(herd: HerdUnderTest) -> None:
    for verb in BEFORE:
        prepare(herd, verb)
    first = {verb: ask(herd, verb, f"later-{verb}").json() for verb in BEFORE}
    herd.end("controller", number=signal.SIGKILL)
    herd.start("controller")
    herd.wait_ready()
    assert {verb: ask(herd, verb, f"later-{verb}").json() for verb in BEFORE} == first
    for verb in BEFORE:
        check_done_once(herd, verb, first[verb])


def test_sent_again_after_the_controller_was_killed_in_the_middle(herd: HerdUnderTest, gate: Gate) -> None:
    for verb in BEFORE:
        prepare(herd, verb)
    with ThreadPoolExecutor(len(BEFORE)) as pool:
        with gate.closed():
            first = {"launch": pool.submit(ask, herd, "launch", "middle-launch")}
            herd.eventually(lambda: herd.http.get("/v1/instances/launch").status_code == 200)
            herd.processes["qemu"].send_signal(signal.SIGSTOP)  # holds what the others need
            try:
                first |= {verb: pool.submit(ask, herd, verb, f"middle-{verb}") for verb in BEFORE if verb != "launch"}
                for verb in BEFORE:
                    under_way = "STARTING" if verb in {"launch", "start"} else "STOPPING"
                    herd.eventually(lambda verb=verb, under_way=under_way: herd.info(verb)["state"] == under_way)
                herd.end("controller", number=signal.SIGKILL)
            finally:
                herd.processes["qemu"].send_signal(signal.SIGCONT)

        for answer in first.values():
            refused(answer.result(), 503, "UNAVAILABLE", "CONTROLLER_UNREACHABLE", "is `vmherd controller` running?")
        herd.start("controller")
        herd.wait_ready()
        again: dict[str, Future[httpx.Response]] = {
            verb: pool.submit(ask, herd, verb, f"middle-{verb}") for verb in BEFORE
        }
    for verb in BEFORE:
        assert again[verb].result().status_code == 200, again[verb].result().text
        check_done_once(herd, verb, again[verb].result().json())
        assert ask(herd, verb, f"middle-{verb}").json() == again[verb].result().json()


def test_an_id_that_was_used_for_another_request(herd: HerdUnderTest) -> None:
    prepare(herd, "stop")
    assert ask(herd, "stop", "used").status_code == 200
    before = herd.store_revision(), herd.fingerprint()
    others = [
        ask(herd, "launch", "used"),
        ask(herd, "start", "used"),
        ask(herd, "delete", "used"),
        herd.http.post("/v1/instances/stop/start", json={"requestId": "used"}),
        herd.http.post("/v1/instances/stop/stop", json={"requestId": "used", "force": False}),
    ]
    for response in others:
        refused(response, 400, "INVALID_ARGUMENT", "REQUEST_ID_REUSED", "'used' was used for another", "take a new one")
    assert (herd.store_revision(), herd.fingerprint()) == before


def test_an_id_of_a_request_that_was_refused_is_still_new(herd: HerdUnderTest) -> None:
    herd.launch("stop", image="idle", start=False, until="")
    refused(ask(herd, "stop", "early"), 400, "FAILED_PRECONDITION", "ILLEGAL_STATE")
    assert herd.http.post("/v1/instances/stop/start", json={}).status_code == 200
    assert ask(herd, "stop", "early").json()["state"] == "STOPPED"


def test_a_failure_is_an_answer_as_well(herd: HerdUnderTest) -> None:
    launch = {"name": "web", "image": "broken", "requestId": "fails"}
    first = herd.http.post("/v1/instances", json=launch)
    refused(first, 409, "ABORTED", "START_FAILED", "'web'")
    again = herd.http.post("/v1/instances", json=launch)
    assert (again.status_code, again.json()) == (409, first.json())
    assert herd.info("web")["generation"] == 1


def test_a_request_that_another_put_an_end_to(herd: HerdUnderTest, gate: Gate) -> None:
    herd.launch("start", image="idle", start=False, until="")
    with ThreadPoolExecutor() as pool, gate.closed():
        start = pool.submit(ask, herd, "start", "overtaken")
        herd.eventually(lambda: herd.info("start")["state"] == "STARTING")
        stop = pool.submit(herd.http.post, "/v1/instances/start/stop", json={"force": True})
        refused(start.result(), 409, "ABORTED", "SUPERSEDED", "a stop came in between")
    assert stop.result().json()["state"] == "STOPPED"
    assert ask(herd, "start", "overtaken").json() == start.result().json()
