"""Requests that make no sense, or not now: each gets a clear error, and nothing is half-done."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from tests.framework.herd import HerdUnderTest
from tests.framework.idle_kernel import idle_kernel
from tests.framework.refusals import command, fails, raised, refused, told, violations
from vmherd.api.v1.controller_pb2 import (
    DeleteRequest,
    LaunchRequest,
    ListRequest,
    PauseRequest,
    RestartRequest,
    ResumeRequest,
    StartRequest,
    StopRequest,
    WaitRequest,
)
from vmherd.controller.store import SqliteStore
from vmherd.model.errors import VmherdError

HOST_MEMORY_MIB = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
STARTING = ("/run", "/run/stream", "/processes")
"""The ends of routes that start a command, which they want to be given."""


@pytest.fixture(scope="module")
def herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    """A herd with one instance that runs without an agent, and one that is stopped."""
    shared_herd.add_image("idle", idle_kernel())
    shared_herd.add_image("broken", b"no kernel" * 1000)
    shared_herd.launch("running", image="idle", until="QMP")
    shared_herd.launch("stopped", image="idle", start=False, until="")
    return shared_herd


def launch_over_http(herd: HerdUnderTest, fields: dict[str, Any], http_code: int) -> dict[str, Any]:
    response = herd.http.post("/v1/instances", json=fields)
    assert response.status_code == http_code, response.text
    return response.json()


def launch_over_grpc(herd: HerdUnderTest, fields: dict[str, Any], _http_code: int) -> dict[str, Any]:
    with herd.client() as client, pytest.raises(VmherdError) as caught:
        client.instances.Launch(json_format.ParseDict(fields, LaunchRequest()), timeout=60)
    return raised(caught.value)


LAUNCHES_OVER = {"http": launch_over_http, "grpc": launch_over_grpc}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("over", LAUNCHES_OVER)
@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"name": ""}, "name", "must be given"),
        ({"name": "a" * 200}, "name", "at most 63 characters, has 200"),
        ({"name": "Web"}, "name", "lower-case letters, digits and '-', and not end with '-'; got 'Web'"),
        ({"name": "web-"}, "name", "got 'web-'"),
        ({"name": "../web"}, "name", "got '../web'"),
        ({"name": "web\n"}, "name", r"got 'web\n'"),
        ({"hardware": {"cpus": 0}}, "hardware.cpus", "from 1 to 255, is 0"),
        ({"hardware": {"cpus": 10_000}}, "hardware.cpus", "from 1 to 255, is 10000"),
        ({"hardware": {"memoryMib": 0}}, "hardware.memory_mib", "from 32 to 67108864 MiB, is 0"),
        ({"hardware": {"memoryMib": 1}}, "hardware.memory_mib", "is 1"),
        ({"hardware": {"memoryMib": HOST_MEMORY_MIB + 1}}, "hardware.memory_mib", f"host's {HOST_MEMORY_MIB} MiB"),
        ({"labels": {str(number): "" for number in range(65)}}, "labels", "at most 64, are 65"),
        ({"labels": {"k" * 64: ""}}, f"labels['{'k' * 63}']", "1 to 63 letters"),
        ({"labels": {"key": "v" * 256}}, "labels['key']", "at most 255 printable"),
        ({"labels": {"key": "\x1b[31m"}}, "labels['key']", "printable"),
        ({"requestId": "two words"}, "request_id", "no space"),
        ({"requestId": "i" * 65}, "request_id", "at most 64"),
    ],
)
def test_a_launch_with_a_wrong_value(
    herd: HerdUnderTest, over: str, fields: dict[str, Any], field: str, words: str
) -> None:
    status = LAUNCHES_OVER[over](herd, {"name": "new", "image": "idle"} | fields, 400)
    told(status, "INVALID_ARGUMENT", "INVALID_ARGUMENT", field, words)
    assert words in violations(status)[field]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("over", LAUNCHES_OVER)
def test_all_that_is_wrong_is_told_at_once(herd: HerdUnderTest, over: str) -> None:
    fields = {"name": "", "hardware": {"cpus": 0, "memoryMib": 0}, "requestId": " "}
    status = LAUNCHES_OVER[over](herd, fields, 400)
    assert set(violations(status)) == {"name", "hardware.cpus", "hardware.memory_mib", "request_id"}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("over", LAUNCHES_OVER)
def test_more_wrong_than_an_error_has_room_for(herd: HerdUnderTest, over: str) -> None:
    labels = {f"{'-' * 60}{number}": "" for number in range(2000)}
    status = LAUNCHES_OVER[over](herd, {"name": "new", "labels": labels}, 400)
    told(status, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "at most 64, are 2000")
    assert "labels" in violations(status)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("over", LAUNCHES_OVER)
@pytest.mark.parametrize("image", ["nosuch", "../builtin", "/etc", "idle/../idle", ".", "a" * 5000, "idle\0"])
def test_an_image_that_is_not_there(herd: HerdUnderTest, over: str, image: str) -> None:
    status = LAUNCHES_OVER[over](herd, {"name": "new", "image": image}, 404)
    told(status, "NOT_FOUND", "IMAGE_NOT_FOUND", f"no image {image[:80]!r}", "there is broken, builtin, idle")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("over", LAUNCHES_OVER)
@pytest.mark.parametrize("name", ["running", "stopped"])
def test_a_name_that_is_taken(herd: HerdUnderTest, over: str, name: str) -> None:
    status = LAUNCHES_OVER[over](herd, {"name": name}, 409)
    told(status, "ALREADY_EXISTS", "INSTANCE_NAME_TAKEN", repr(name), "take another name")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"name": "new", "image": "idle"', "JSON"),
        (b"", "must be given"),
        (b"[]", "object"),
        (b'"new"', "object"),
        (b"\xff", "UTF-8"),
        (b'{"name": "new", "cpus": 2}', "cpus"),
        (b'{"name": "new", "hardware": {"cores": 2}}', "cores"),
        (b'{"name": ["new"]}', "name"),
        (b'{"name": 5}', "name"),
        (b'{"name": "new", "start": "no"}', "start"),
        (b'{"name": "new", "labels": ["a"]}', "labels"),
        (b'{"name": "new", "hardware": {"cpus": -1}}', "cpus"),
        (b'{"name": "new", "hardware": {"cpus": "two"}}', "cpus"),
        (b'{"name": "new", "hardware": {"memoryMib": -128}}', "memory"),
        (b'{"name": "new", "hardware": {"memoryMib": 128.5}}', "memory"),
        (b'{"name": "new", "hardware": {"memoryMib": 4294967296}}', "memory"),
        (b'{"name": "new", "name": "newer"}', "name"),
        (b'{"name": "new", "hardware": ' + b'{"a":' * 5000 + b"0" + b"}" * 5001, ""),
    ],
)
def test_a_body_that_is_no_launch(herd: HerdUnderTest, body: bytes, words: str) -> None:
    response = herd.http.post("/v1/instances", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert words in response.json()["message"]
    assert response.json()["code"] == 3


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
def test_a_body_of_100_mb(herd: HerdUnderTest, is_declared: bool) -> None:
    before_kib = most_memory_kib(herd.processes["gateway"].pid)
    headers = {"Content-Type": "application/json"} | ({"Content-Length": "100000000"} if is_declared else {})
    chunks = (b"x" * 1_000_000 for _ in range(100))
    response = herd.http.post("/v1/instances", content=chunks, headers=headers)
    refused(response, 413, "INVALID_ARGUMENT", "BODY_TOO_LARGE", "larger than 1048576 bytes")
    assert most_memory_kib(herd.processes["gateway"].pid) < before_kib + 10 * 1024


def most_memory_kib(pid: int) -> int:
    """The most memory that a process ever had."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("start", [False, True])
def test_launches_of_one_name_at_once_have_one_winner(herd: HerdUnderTest, count: int, start: bool) -> None:
    together = threading.Barrier(count)

    def launch(_number: int) -> dict[str, Any]:
        with herd.client() as client:
            together.wait(10)
            try:
                launched = client.instances.Launch(LaunchRequest(name="twin", image="idle", start=start), timeout=60)
            except VmherdError as error:
                return raised(error)
            return json_format.MessageToDict(launched)

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(launch, range(count)))
    [winner] = [answer for answer in answers if "uid" in answer]
    for answer in answers:
        if answer is not winner:
            told(answer, "ALREADY_EXISTS", "INSTANCE_NAME_TAKEN", "'twin'")
    assert herd.info("twin")["uid"] == winner["uid"]
    assert [path.name for path in herd.state.instances.iterdir() if path.name == winner["uid"]] == [winner["uid"]]
    assert len(list(herd.state.instances.iterdir())) == 3
    assert herd.http.delete("/v1/instances/twin", params={"force": True}).status_code == 200


STATES = [
    (StartRequest(name="running"), "start 'running': it is RUNNING; start is possible when it is FAILED, STOPPED"),
    (StopRequest(name="stopped"), "stop 'stopped': it is STOPPED; stop is possible when it is PAUSED, RUNNING"),
    (StopRequest(name="stopped", force=True), "stop 'stopped': it is STOPPED"),
    (RestartRequest(name="stopped"), "restart 'stopped': it is STOPPED"),
    (PauseRequest(name="stopped"), "pause 'stopped': it is STOPPED; pause is possible when it is RUNNING"),
    (ResumeRequest(name="stopped"), "resume 'stopped': it is STOPPED; resume is possible when it is PAUSED"),
    (ResumeRequest(name="running"), "resume 'running': it is RUNNING"),
    (DeleteRequest(name="running"), "delete 'running': it is RUNNING"),
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("request_", "words"), STATES, ids=lambda it: str(it)[:20])
def test_what_the_state_forbids(herd: HerdUnderTest, request_: Any, words: str) -> None:
    verb = type(request_).__name__.removesuffix("Request")
    with herd.client() as client, pytest.raises(VmherdError) as caught:
        getattr(client.instances, verb)(request_, timeout=60)
    told(raised(caught.value), "FAILED_PRECONDITION", "ILLEGAL_STATE", f"cannot {words}")
    path = f"/v1/instances/{request_.name}"
    fields = json_format.MessageToDict(request_)
    del fields["name"]
    response = herd.http.delete(path) if verb == "Delete" else herd.http.post(f"{path}/{verb.lower()}", json=fields)
    refused(response, 400, "FAILED_PRECONDITION", "ILLEGAL_STATE", f"cannot {words}")


@pytest.mark.usefixtures("unchanged")
def test_a_delete_that_is_refused_tells_of_force(herd: HerdUnderTest) -> None:
    response = herd.http.delete("/v1/instances/running")
    refused(response, 400, "FAILED_PRECONDITION", "ILLEGAL_STATE", "stop it first, or delete it with force")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("name", "shown"), [("nobody", "nobody"), ("a" * 5000, "a" * 5000), ("%2e%2e", ".."), ("We%20b", "We b")]
)
def test_an_instance_that_is_not_there_on_every_route(herd: HerdUnderTest, name: str, shown: str) -> None:
    paths = herd.http.get("/openapi.json").json()["paths"]
    routes = [(method, path) for path, methods in paths.items() if "{name}" in path for method in methods]
    assert len(routes) >= 14
    for method, path in routes:
        if method == "head":
            continue  # it has no body to tell why
        body = {"json": {"command": ["true"]} if path.endswith(STARTING) else {}} if method == "post" else {}
        query = {"path": "/etc/hostname"} if path.endswith("/files") else {}
        response = herd.http.request(method, path.replace("{name}", name), params=query, **body)
        refused(response, 404, "NOT_FOUND", "INSTANCE_NOT_FOUND", f"no instance is called '{shown[:700]}")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("path", "query", "code", "reason", "words"),
    [
        ("instances/running/wait", {"until": "TOMORROW"}, "INVALID_ARGUMENT", None, "until"),
        ("instances/running/wait", {"until": "99"}, "INVALID_ARGUMENT", None, "until"),
        ("instances/running/wait", {"timeout": "-1s"}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "from 0 s to 86400 s"),
        ("instances/running/wait", {"timeout": "86401s"}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "is 86401 s"),
        ("instances/running/wait", {"timeout": "soon"}, "INVALID_ARGUMENT", None, "timeout"),
        ("instances", {"pageToken": "!!!"}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "next_page_token of an earlier"),
        ("instances", {"pageToken": "A" * 4000}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "next_page_token"),
        ("instances", {"pageSize": "4294967296"}, "INVALID_ARGUMENT", None, "page"),
        ("instances", {"pageSize": "-1"}, "INVALID_ARGUMENT", None, "page"),
        ("instances", {"labelSelector": "=x"}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "each `key` or `key=value`"),
        ("instances", {"labelSelector": ["a"] * 65}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "at most 64"),
        ("instances", {"colour": "red"}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "no such query parameter"),
        ("watch", {"fromRevision": "999999"}, "OUT_OF_RANGE", "REVISION_UNKNOWN", "list again and watch from there"),
        ("watch", {"fromRevision": "-1"}, "OUT_OF_RANGE", "REVISION_UNKNOWN", "revision -1 has not been"),
        ("watch", {"fromRevision": "9" * 30}, "INVALID_ARGUMENT", None, "revision"),
        ("watch", {"name": "Web"}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "lower-case"),
    ],
)
def test_a_query_that_makes_no_sense(
    herd: HerdUnderTest, path: str, query: dict[str, Any], code: str, reason: str | None, words: str
) -> None:
    response = herd.http.get(f"/v1/{path}", params=query)
    assert response.status_code == 400, response.text
    told(response.json(), code, reason or code, words)


@pytest.mark.usefixtures("unchanged")
def test_what_only_grpc_lets_pass(herd: HerdUnderTest) -> None:
    nonsense: Any = 99
    with herd.client() as client:
        with pytest.raises(VmherdError) as caught:
            list(client.instances.Wait(WaitRequest(name="running", until=nonsense), timeout=60))
        told(raised(caught.value), "INVALID_ARGUMENT", "INVALID_ARGUMENT", "until", "PROCESS, QMP, AGENT", "is 99")
        with pytest.raises(VmherdError) as caught:
            client.instances.List(ListRequest(label_selector=["a"] * 100_000), timeout=60)
        told(raised(caught.value), "INVALID_ARGUMENT", "INVALID_ARGUMENT", "at most 64")


@pytest.mark.usefixtures("unchanged")
def test_a_page_size_beyond_the_largest_is_the_largest(herd: HerdUnderTest) -> None:
    page = herd.http.get("/v1/instances", params={"pageSize": 4_000_000_000}).json()
    assert [instance["name"] for instance in page["instances"]] == ["running", "stopped"]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("words", "exit_code", "told_"),
    [
        (["launch", "Web"], 2, ["name: must start with a lower-case letter"]),
        (["launch", "running", "--image", "idle"], 4, ["'running' exists already"]),
        (["launch", "new", "--image", "../x"], 3, ["no image '../x'"]),
        (["launch", "new", "--memory", str(HOST_MEMORY_MIB + 1)], 2, ["hardware.memory_mib", "MiB"]),
        (["info", "nobody"], 3, ["no instance is called 'nobody'"]),
        (["delete", "running"], 4, ["cannot delete 'running'", "force"]),
        (["stop", "stopped"], 4, ["cannot stop 'stopped': it is STOPPED"]),
        (["wait", "stopped", "--until", "agent"], 4, ["'stopped' is STOPPED and will not reach AGENT"]),
        (["exec", "running", "true"], 5, ["no agent in the guest"]),
    ],
    ids=lambda it: " ".join(it)[:30] if isinstance(it, list) else str(it),
)
def test_the_command_line_tells_it_in_one_line(
    herd: HerdUnderTest, words: list[str], exit_code: int, told_: list[str]
) -> None:
    fails(command(herd, *words), exit_code, *told_)


def test_a_wait_on_an_instance_that_fails_to_start_ends_at_once_with_the_reason(herd: HerdUnderTest) -> None:
    before = herd.fingerprint()
    herd.launch("new", image="broken", start=False, until="")
    helper = herd.processes["qemu"]
    with ThreadPoolExecutor() as pool:
        helper.send_signal(signal.SIGSTOP)  # holds the start where QEMU is to be run
        try:
            start = pool.submit(herd.http.post, "/v1/instances/new/start", json={})
            herd.eventually(lambda: herd.info("new")["state"] == "STARTING")
            wait = herd.stream("/v1/instances/new/wait", until="ADDRESS", timeout="60s")
            first = next(wait)["result"]
        finally:
            helper.send_signal(signal.SIGCONT)
        *_, last = wait
    assert (first["instance"]["state"], first["waitingFor"]) == ("STARTING", "the QEMU process")
    why = "QEMU exited with code 1"
    told(last["error"], "FAILED_PRECONDITION", "INSTANCE_FAILED", "'new' is FAILED and will not reach ADDRESS", why)
    refused(start.result(), 409, "ABORTED", "START_FAILED", "'new' did not start", why, "or delete it")
    exit_ = herd.info("new")["lastExit"]
    assert why in exit_["detail"]
    assert exit_["stderrTail"].startswith("qemu: ")
    assert herd.http.delete("/v1/instances/new").status_code == 200
    assert herd.fingerprint() == before


@pytest.mark.usefixtures("unchanged")
def test_a_wait_for_what_cannot_come_ends_at_once(herd: HerdUnderTest) -> None:
    [first, last] = herd.stream("/v1/instances/stopped/wait", until="QMP", timeout="60s")
    assert first["result"]["instance"]["state"] == "STOPPED"
    told(last["error"], "FAILED_PRECONDITION", "INSTANCE_STOPPED", "'stopped' is STOPPED and will not reach QMP")


def test_a_watch_from_a_revision_that_was_compacted(herd: HerdUnderTest) -> None:
    herd.end("controller")
    revision = asyncio.run(compacted(herd.state.store))
    herd.start("controller")
    herd.wait_ready()
    response = herd.http.get("/v1/watch", params={"fromRevision": revision - 1})
    refused(response, 400, "OUT_OF_RANGE", "REVISION_COMPACTED", "no longer kept; list again and watch from there")
    from_list = herd.http.get("/v1/instances").json()["revision"]
    with contextlib.closing(herd.stream("/v1/watch", fromRevision=from_list)) as changes:
        herd.launch("newer", image="idle", start=False, until="")
        assert next(changes)["result"]["instance"]["name"] == "newer"
    assert herd.http.delete("/v1/instances/newer").status_code == 200


async def compacted(path: Path) -> int:
    """Forgets every change in a store, and gives its revision."""
    store = SqliteStore(path)
    try:
        _, revision = await store.list("")
        await store.compact(revision)
    finally:
        await store.close()
    return revision
