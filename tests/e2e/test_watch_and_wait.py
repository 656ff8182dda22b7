"""Watch misses nothing and repeats nothing, Wait ends when it must, and List shows it page by page."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.framework.herd import AT_ONCE_S, HerdUnderTest
from tests.framework.idle_kernel import idle_kernel
from tests.framework.refusals import told
from vmherd.api.v1.controller_pb2 import WatchRequest, WatchResponse

MANY = 25


@pytest.fixture(scope="module")
def herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    shared_herd.add_image("idle", idle_kernel())
    return shared_herd


@pytest.fixture(autouse=True)
def no_instances_left(herd: HerdUnderTest) -> Iterator[None]:
    yield
    herd.remove_instances()


def make(herd: HerdUnderTest, name: str, **fields: Any) -> dict[str, Any]:
    return herd.launch(name, image="idle", start=False, until="", **fields)


def delete(herd: HerdUnderTest, name: str) -> None:
    assert herd.http.delete(f"/v1/instances/{name}").status_code == 200


def revision_of(herd: HerdUnderTest) -> int:
    return int(herd.http.get("/v1/instances", params={"pageSize": 1}).json()["revision"])


@contextlib.contextmanager
def watching(herd: HerdUnderTest, **query: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """A watch over HTTP, open until the context is left."""
    with contextlib.closing(herd.stream("/v1/watch", **query)) as lines:
        yield (line["result"] for line in lines)


def told_of(change: dict[str, Any]) -> tuple[str, str]:
    return change["kind"], change["instance"]["name"] if "instance" in change else ""


def until_deleted(changes: Iterator[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The changes up to the end of this instance."""
    seen = []
    for change in changes:
        seen.append(change)
        if told_of(change) == ("DELETED", name):
            break
    return seen


def test_from_0_it_tells_what_is_there_and_then_what_changes(herd: HerdUnderTest) -> None:
    uids = {name: make(herd, name)["uid"] for name in ("old", "older")}
    with watching(herd) as changes:
        there = [next(changes) for _ in range(3)]
        assert [told_of(change) for change in there] == [("CURRENT", "old"), ("CURRENT", "older"), ("SYNCED", "")]
        assert {change["instance"]["name"]: change["instance"]["uid"] for change in there[:2]} == uids
        make(herd, "new")
        assert told_of(next(changes)) == ("CHANGED", "new")
        delete(herd, "old")
        later = until_deleted(changes, "old")
    last = later[-1]["instance"]
    assert (last["uid"], last["state"]) == (uids["old"], "STOPPED")  # as it was last
    revisions = [int(change["revision"]) for change in there[2:] + later]
    assert revisions == sorted(set(revisions))
    assert [change["instance"]["revision"] for change in later] == [change["revision"] for change in later]


def test_events_tell_the_same_as_lines(herd: HerdUnderTest) -> None:
    make(herd, "web")
    events = []
    with herd.http.stream("GET", "/v1/watch", headers={"Accept": "text/event-stream"}) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == 2:
                break
    with watching(herd) as changes:
        assert events == [next(changes), next(changes)]


def test_one_name_alone(herd: HerdUnderTest) -> None:
    make(herd, "other")
    with watching(herd, name="web") as changes:
        assert told_of(next(changes)) == ("SYNCED", "")
        make(herd, "another")
        make(herd, "web")
        delete(herd, "another")
        delete(herd, "web")
        assert {change["instance"]["name"] for change in until_deleted(changes, "web")} == {"web"}


def test_from_the_revision_of_a_list_it_misses_nothing(herd: HerdUnderTest) -> None:
    make(herd, "web")
    page = herd.http.get("/v1/instances").json()
    make(herd, "new")
    delete(herd, "web")
    with watching(herd, fromRevision=page["revision"]) as changes:
        seen = until_deleted(changes, "web")
    assert [change["kind"] for change in seen[:-1]] == ["CHANGED"] * (len(seen) - 1)
    assert {told_of(change) for change in seen} >= {("CHANGED", "new"), ("DELETED", "web")}
    assert all(int(change["revision"]) > int(page["revision"]) for change in seen)


def test_the_revision_of_a_list_goes_on_when_all_is_deleted(herd: HerdUnderTest) -> None:
    make(herd, "web")
    delete(herd, "web")
    revision = revision_of(herd)
    with watching(herd, fromRevision=revision) as changes:
        make(herd, "new")
        first = next(changes)
    assert told_of(first) == ("CHANGED", "new")
    assert int(first["revision"]) == revision + 1


def test_watches_that_come_and_go_see_every_change_once(herd: HerdUnderTest) -> None:
    start = revision_of(herd)
    rounds = 15

    def churn() -> None:
        for number in range(rounds):
            make(herd, f"web-{number}")
            delete(herd, f"web-{number}")

    def follow(step: int) -> list[dict[str, Any]]:
        """Reads a few changes from each of many watches, each from where the last one ended."""
        seen: list[dict[str, Any]] = []
        while not seen or told_of(seen[-1]) != ("DELETED", f"web-{rounds - 1}"):
            with watching(herd, fromRevision=seen[-1]["revision"] if seen else start) as changes:
                for change in itertools.islice(changes, step):
                    seen.append(change)
                    if told_of(change) == ("DELETED", f"web-{rounds - 1}"):
                        break
        return seen

    with ThreadPoolExecutor() as pool:
        writer = pool.submit(churn)
        followers = [pool.submit(follow, step) for step in (1, 7, 10_000)]
        writer.result()
        one_by_one, in_sevens, at_once = (follower.result() for follower in followers)
    assert one_by_one == in_sevens == at_once
    revisions = [int(change["revision"]) for change in at_once]
    assert revisions == sorted(set(revisions))
    assert [told_of(it) for it in at_once if it["kind"] == "DELETED"] == [
        ("DELETED", f"web-{n}") for n in range(rounds)
    ]


def test_list_then_watch_shows_what_there_is_whenever_it_begins(herd: HerdUnderTest) -> None:
    """A reader who applies the changes to its list has, at the end, the list."""
    enough = threading.Event()

    def churn() -> None:
        for number in itertools.count():
            make(herd, f"web-{number}")
            if number % 2:
                delete(herd, f"web-{number}")
            if enough.is_set():
                break
        make(herd, "last")
        delete(herd, "last")

    def mirror(page: dict[str, Any]) -> set[str]:
        names = {instance["name"] for instance in page["instances"]}
        with watching(herd, fromRevision=page["revision"]) as changes:
            for change in until_deleted(changes, "last"):
                (names.discard if change["kind"] == "DELETED" else names.add)(change["instance"]["name"])
        return names

    pages: dict[str, dict[str, Any]] = {}

    def look() -> bool:
        page = herd.http.get("/v1/instances").json()
        pages[page["revision"]] = page
        return len(pages) >= 3

    with ThreadPoolExecutor() as pool:
        writer = pool.submit(churn)
        try:
            herd.eventually(look)
        finally:
            enough.set()
        mirrors = [pool.submit(mirror, page) for page in pages.values()]
        writer.result()
        shown = [it.result() for it in mirrors]
    there = {instance["name"] for instance in herd.http.get("/v1/instances").json()["instances"]}
    assert shown == [there] * len(mirrors)


def test_a_reader_that_does_not_read_holds_up_nobody(herd: HerdUnderTest) -> None:
    labels = {f"key-{number}": "v" * 255 for number in range(64)}
    host, _, port = herd.address.rpartition(":")
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect((host, int(port)))
    request = f"GET /v1/watch HTTP/1.1\r\nHost: {herd.address}\r\nAuthorization: Bearer {herd.token}\r\n\r\n"
    with lazy, herd.client() as client:
        lazy.sendall(request.encode())
        lazy_too = client.instances.Watch(WatchRequest())
        assert next(lazy_too).kind == WatchResponse.SYNCED
        with watching(herd) as changes:
            assert told_of(next(changes)) == ("SYNCED", "")
            for number in range(MANY):
                make(herd, f"web-{number}", labels=labels)
                while told_of(next(changes)) != ("CHANGED", f"web-{number}"):
                    pass
        # The one that did not read has missed nothing all the same.
        changed = itertools.takewhile(lambda change: change.instance.name != "end", lazy_too)
        make(herd, "end")
        seen = {change.instance.name for change in changed}
        assert seen == {f"web-{number}" for number in range(MANY)}


def test_a_wait_for_each_step_of_a_start(herd: HerdUnderTest) -> None:
    herd.launch("web", until="")
    steps = ["PROCESS", "QMP", "AGENT", "ADDRESS"]
    for count, until in enumerate(steps, 1):
        readiness = herd.wait("web", until)["readiness"]
        assert [step["rung"] for step in readiness["steps"]][:count] == steps[:count]
    assert readiness["reached"] == "ADDRESS"
    elapsed_s = [float(step["elapsed"].removesuffix("s")) for step in readiness["steps"]]
    assert elapsed_s == sorted(elapsed_s)


def test_the_deadline_of_a_wait_names_what_was_waited_for(herd: HerdUnderTest) -> None:
    herd.launch("web", image="idle", until="QMP")
    started_s = time.monotonic()
    [first, last] = herd.stream("/v1/instances/web/wait", until="ADDRESS", timeout="0.3s")
    assert 0.3 <= time.monotonic() - started_s < AT_ONCE_S
    assert first["result"]["waitingFor"].startswith("the guest agent")
    words = "'web' is RUNNING; waited 0.3 s for the guest agent; does the image start qemu-guest-agent?"
    told(last["error"], "DEADLINE_EXCEEDED", "WAIT_TIMEOUT", words)
    [_, last] = herd.stream("/v1/instances/web/wait", until="STOPPED", timeout="0s")
    told(last["error"], "DEADLINE_EXCEEDED", "WAIT_TIMEOUT", "waited 0 s for the instance to end")


def test_a_wait_for_the_end(herd: HerdUnderTest) -> None:
    herd.launch("web", image="idle", until="QMP")
    with contextlib.closing(herd.stream("/v1/instances/web/wait", until="STOPPED", timeout="60s")) as wait:
        assert next(wait)["result"]["waitingFor"] == "the instance to end"
        assert herd.http.post("/v1/instances/web/stop", json={"force": True}).status_code == 200
        *_, last = wait
    assert (last["result"]["instance"]["state"], last["result"]["waitingFor"]) == ("STOPPED", "")
    [only] = herd.stream("/v1/instances/web/wait", until="STOPPED")
    assert only["result"] == last["result"]


@pytest.mark.parametrize("until", ["ADDRESS", "STOPPED"])
def test_a_wait_ends_when_the_instance_is_deleted(herd: HerdUnderTest, until: str) -> None:
    herd.launch("web", image="idle", until="QMP")
    with contextlib.closing(herd.stream("/v1/instances/web/wait", until=until, timeout="60s")) as wait:
        next(wait)
        assert herd.http.delete("/v1/instances/web", params={"force": True}).status_code == 200
        make(herd, "web")  # another one of the same name is not the one that was waited for
        *_, last = wait
    assert "error" in last, last
    told(last["error"], "NOT_FOUND", "INSTANCE_NOT_FOUND", "no instance is called 'web'")


def test_the_default_is_to_wait_for_the_agent(herd: HerdUnderTest) -> None:
    herd.launch("web", image="idle", until="QMP")
    [_, last] = herd.stream("/v1/instances/web/wait", timeout="0.1s")
    told(last["error"], "DEADLINE_EXCEEDED", "WAIT_TIMEOUT", "for the guest agent")


def test_pages(herd: HerdUnderTest) -> None:
    names = [f"web-{number:02}" for number in range(MANY)]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda name: make(herd, name), names))
    token, pages = "", []
    while True:
        page = herd.http.get("/v1/instances", params={"pageSize": 10, "pageToken": token}).json()
        pages.append([instance["name"] for instance in page["instances"]])
        if pages[0] == names[:10] and len(pages) == 1:
            delete(herd, "web-00")  # what is deleted or made meanwhile moves no other from page to page
            make(herd, "api")
        token = page["nextPageToken"]
        if not token:
            break
    assert pages == [names[:10], names[10:20], names[20:]]
    whole = herd.http.get("/v1/instances", params={"pageSize": 25}).json()
    assert (len(whole["instances"]), whole["nextPageToken"]) == (25, "")


def test_a_page_that_ends_with_the_last_instance_has_no_next(herd: HerdUnderTest) -> None:
    for name in ("a", "b"):
        make(herd, name)
    page = herd.http.get("/v1/instances", params={"pageSize": 2}).json()
    assert ([it["name"] for it in page["instances"]], page["nextPageToken"]) == (["a", "b"], "")


@pytest.mark.parametrize(
    ("selectors", "names"),
    [
        ([], ["db", "web-1", "web-2"]),
        (["tier"], ["db", "web-1", "web-2"]),
        (["tier=web"], ["web-1", "web-2"]),
        (["tier=web", "colour=green"], ["web-2"]),
        (["tier=web", "tier=db"], []),
        (["colour="], ["web-1"]),
        (["colour"], ["web-1", "web-2"]),
        (["equation=a=b"], ["db"]),
        (["nosuch"], []),
    ],
)
def test_labels_select(labelled: HerdUnderTest, selectors: list[str], names: list[str]) -> None:
    page = labelled.http.get("/v1/instances", params={"labelSelector": selectors}).json()
    assert [instance["name"] for instance in page["instances"]] == names


@pytest.fixture
def labelled(herd: HerdUnderTest) -> HerdUnderTest:
    make(herd, "db", labels={"tier": "db", "equation": "a=b"})
    make(herd, "web-1", labels={"tier": "web", "colour": ""})
    make(herd, "web-2", labels={"tier": "web", "colour": "green"})
    return herd


def test_pages_of_what_labels_select(labelled: HerdUnderTest) -> None:
    query = {"labelSelector": "tier=web", "pageSize": 1}
    first = labelled.http.get("/v1/instances", params=query).json()
    second = labelled.http.get("/v1/instances", params=query | {"pageToken": first["nextPageToken"]}).json()
    assert [it["name"] for page in (first, second) for it in page["instances"]] == ["web-1", "web-2"]
    assert second["nextPageToken"] == ""
