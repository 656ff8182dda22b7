"""Guest commands where no agent answers, and those that no agent is even asked."""

from __future__ import annotations

from typing import Any

import pytest

from tests.framework.herd import HerdUnderTest
from tests.framework.idle_kernel import idle_kernel
from tests.framework.refusals import command, fails, refused, violations

READING = ["ping", "info", "get-osinfo", "network-get-interfaces", "get-host-name"]


@pytest.fixture(scope="module")
def herd(shared_herd: HerdUnderTest) -> HerdUnderTest:
    """A herd with a guest that never has an agent, one that is stopped, and one whose agent will come."""
    shared_herd.add_image("idle", idle_kernel())
    shared_herd.launch("idle", image="idle", until="QMP")
    shared_herd.launch("stopped", image="idle", start=False, until="")
    return shared_herd


def run(herd: HerdUnderTest, name: str, *words: str, **fields: Any) -> Any:
    return herd.http.post(f"/v1/instances/{name}/run", json={"command": words, **fields})


@pytest.mark.usefixtures("unchanged")
def test_a_guest_without_an_agent(herd: HerdUnderTest) -> None:
    answers = [herd.http.get(f"/v1/instances/idle/guest/{command}") for command in READING]
    for response in [*answers, run(herd, "idle", "true")]:
        refused(response, 503, "UNAVAILABLE", "AGENT_NOT_RUNNING", "'idle'", "no agent in the guest")
        assert response.headers["Retry-After"] == "1"


@pytest.mark.usefixtures("unchanged")
def test_a_guest_that_does_not_run(herd: HerdUnderTest) -> None:
    answers = [herd.http.get(f"/v1/instances/stopped/guest/{command}") for command in READING]
    for response in [*answers, run(herd, "stopped", "true")]:
        refused(response, 400, "FAILED_PRECONDITION", "ILLEGAL_STATE", "'stopped': it is STOPPED", "RUNNING")


def test_a_paused_guest(herd: HerdUnderTest) -> None:
    before = herd.store_revision()
    assert herd.http.post("/v1/instances/idle/pause", json={}).json()["state"] == "PAUSED"
    response = herd.http.get("/v1/instances/idle/guest/ping")
    refused(response, 400, "FAILED_PRECONDITION", "ILLEGAL_STATE", "'idle': it is PAUSED", "RUNNING")
    assert herd.http.post("/v1/instances/idle/resume", json={}).json()["state"] == "RUNNING"
    herd.eventually(lambda: herd.store_revision() == before + 2)  # the answer may come before the store is through


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"command": []}, "command", "list of words"),
        ({"command": [""]}, "command", "list of words"),
        ({"command": ["x"] * 1025}, "command", "at most 1024 words"),
        ({"command": ["a\0b"]}, "command", "NUL"),
        ({"command": ["true"], "environment": {"A=B": "C"}}, "environment['A=B']", "without '='"),
        ({"command": ["true"], "environment": {"A" * 4000: "\0"}}, f"environment['{'A' * 60}", "without '='"),
        ({"command": ["true"], "timeout": "0s"}, "timeout", "from 0.001 s"),
        ({"command": ["true"], "timeout": "-1s"}, "timeout", "from 0.001 s"),
        ({"command": ["true"], "timeout": "86401s"}, "timeout", "to 86400 s"),
    ],
)
def test_a_command_that_makes_no_sense(herd: HerdUnderTest, fields: dict[str, Any], field: str, words: str) -> None:
    status = refused(
        herd.http.post("/v1/instances/idle/run", json=fields), 400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", words
    )
    [(wrong, why)] = violations(status).items()
    assert wrong.startswith(field)
    assert words in why


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("data", ["no base64!", "YQ", "a"])
def test_an_input_that_is_no_base64(herd: HerdUnderTest, data: str) -> None:
    response = herd.http.post("/v1/instances/idle/run", json={"command": ["cat"], "input": data})
    assert response.status_code == (503 if data == "YQ" else 400), response.text  # the padding may be left out


def test_an_agent_that_comes_dies_comes_back_and_hangs(herd: HerdUnderTest) -> None:
    herd.launch("web", until="QMP")
    refused(herd.http.get("/v1/instances/web/guest/ping"), 503, "UNAVAILABLE", "AGENT_NOT_RUNNING", "no agent in the")
    herd.wait("web", "AGENT")
    assert run(herd, "web", "echo", "hello").json()["stdout"] == "hello\n"

    # The agent is its command's parent.
    with herd.agent_coming_back():
        killed = run(herd, "web", "sh", "-c", "kill -KILL $PPID")
        assert killed.status_code in {503, 504}, killed.text
        assert "outcome unknown" in killed.json()["message"]
    herd.eventually(lambda: herd.http.get("/v1/instances/web/guest/ping").status_code == 200)

    hung = run(herd, "web", "sh", "-c", "kill -STOP $PPID", timeout="1s")
    refused(hung, 504, "DEADLINE_EXCEEDED", hung.json()["details"][0]["reason"], "'web'", "outcome unknown")
    response = herd.http.get("/v1/instances/web/guest/ping", headers={"Grpc-Timeout": "500m"})
    refused(response, 504, "DEADLINE_EXCEEDED", "AGENT_UNRESPONSIVE", "'web'", "guest-ping", "nothing answers")
    fails(command(herd, "exec", "web", "--timeout", "0.5", "true"), 6, "'web'")
    assert herd.info("web")["state"] == "RUNNING"
    assert herd.http.delete("/v1/instances/web", params={"force": True}).status_code == 200
