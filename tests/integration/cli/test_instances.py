from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypeGuard

import pytest
from typer.testing import CliRunner

from tests.framework.fake_controller import FakeController
from tests.integration.cli.conftest import Cli
from vmherd.api.v1.controller_pb2 import (
    DeleteRequest,
    LaunchRequest,
    ListRequest,
    Network,
    RestartRequest,
    StartRequest,
    StopRequest,
    UpdateRequest,
    WaitRequest,
    WatchRequest,
)
from vmherd.api.v1.instance_pb2 import Exit, Hardware, Instance, Nic, PortForward
from vmherd.cli.app import app
from vmherd.model.errors import DeadlineExceeded, FailedPrecondition, InternalError, Unavailable


def test_launch_sends_what_was_given_and_waits_for_an_address(cli: Cli, controller: FakeController) -> None:
    result = cli(
        *("launch", "web", "--image", "builtin", "--cpus", "2", "--memory", "256"),
        *("--label", "tier=front", "--label", "note=a=b", "--request-id", "r1", "--timeout", "30"),
    )
    launch, wait = controller.requests
    assert launch == LaunchRequest(
        name="web",
        image="builtin",
        hardware=Hardware(cpus=2, memory_mib=256),
        labels={"tier": "front", "note": "a=b"},
        start=True,
        request_id="r1",
    )
    assert isinstance(wait, WaitRequest)
    assert (wait.name, wait.until, wait.timeout.seconds) == ("web", WaitRequest.ADDRESS, 30)
    assert result.exit_code == 0
    assert result.stdout == "web: running at 10.0.2.15\n"
    assert [line.split() for line in result.stderr.splitlines()] == [
        ["process", "0.10", "s"],
        ["qmp", "0.20", "s"],
        ["agent", "0.30", "s"],
        ["address", "0.40", "s"],
    ]


def test_launch_plugs_in_what_was_given(cli: Cli, controller: FakeController) -> None:
    result = cli(
        *("launch", "web", "--network", "lan,mac=52:54:00:00:00:01,address=10.0.0.9", "--network", "user"),
        *("--forward", "2222:22", "--autostart", "--no-wait"),
    )
    ssh = PortForward(protocol=PortForward.TCP, guest_port=22, host_port=2222)
    assert controller.requests == [
        LaunchRequest(
            name="web",
            start=True,
            autostart=True,
            nics=[
                Nic(network="lan", mac="52:54:00:00:00:01", ipv4_address="10.0.0.9"),
                Nic(network="user", forwards=[ssh]),
            ],
        )
    ]
    assert result.stdout == "web: running at 127.0.0.1:2222 → 22/tcp\n"


@pytest.mark.parametrize(("options", "until"), [((), WaitRequest.ADDRESS), (("--network", "none"), WaitRequest.AGENT)])
def test_who_has_no_network_is_ready_without_an_address(
    cli: Cli, controller: FakeController, options: tuple[str, ...], until: int
) -> None:
    cli("launch", "web", *options)
    assert controller.requests[-1].until == until  # type: ignore[attr-defined]


def test_launch_leaves_the_hardware_to_the_image(cli: Cli, controller: FakeController) -> None:
    cli("launch", "web", "--no-wait")
    assert controller.requests == [LaunchRequest(name="web", start=True)]


def test_launch_can_wait_for_less(cli: Cli, controller: FakeController) -> None:
    cli("launch", "web", "--until", "qmp")
    assert controller.requests[-1].until == WaitRequest.QMP  # type: ignore[attr-defined]


def test_launch_without_a_start_waits_for_nothing(cli: Cli, controller: FakeController) -> None:
    result = cli("launch", "web", "--no-start")
    assert controller.requests == [LaunchRequest(name="web", start=False)]
    assert result.stdout == "web: stopped\n"


def test_a_launch_that_failed_to_start_is_an_error_without_control_characters(
    cli: Cli, controller: FakeController
) -> None:
    controller.launch_state = Instance.FAILED
    result = cli("launch", "web")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "vmherd: web did not start: no room\ufffd[2J; `vmherd info web` shows more\n"


def test_launch_as_json_is_one_document(cli: Cli, controller: FakeController) -> None:
    result = cli("launch", "web", "--json")
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    document = json.loads(line)
    assert document["state"] == "RUNNING"
    assert document["readiness"]["reached"] == "ADDRESS"
    assert document["revision"] == "0"


@pytest.mark.parametrize(
    ("verb", "before", "after"),
    [
        ("start", Instance.STOPPED, "running"),
        ("stop", Instance.RUNNING, "stopped by the guest agent's shutdown"),
        ("restart", Instance.RUNNING, "running"),
        ("pause", Instance.RUNNING, "paused"),
        ("resume", Instance.PAUSED, "running"),
    ],
)
def test_verbs_take_several_names_and_answer_in_their_order(
    cli: Cli, controller: FakeController, verb: str, before: Instance.State.ValueType, after: str
) -> None:
    for name in ("a", "b", "c"):
        controller.add(name, before)
    result = cli(verb, "c", "a", "b")
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{name}: {after}\n" for name in "cab")


def test_one_name_that_fails_does_not_keep_the_others(cli: Cli, controller: FakeController) -> None:
    controller.add("a")
    controller.add("b")
    result = cli("stop", "a", "nobody", "b")
    assert result.exit_code == 3
    assert result.stdout == "a: stopped by the guest agent's shutdown\nb: stopped by the guest agent's shutdown\n"
    assert result.stderr == "vmherd: no instance is called 'nobody'; `vmherd list` shows those that exist\n"


@pytest.mark.parametrize(
    ("args", "request_"),
    [
        (("start", "--request-id", "x"), StartRequest(name="a", request_id="x")),
        (("stop", "--force", "--request-id", "x"), StopRequest(name="a", force=True, request_id="x")),
        (("restart", "--force", "--request-id", "x"), RestartRequest(name="a", force=True, request_id="x")),
        (("delete", "--force", "--request-id", "x"), DeleteRequest(name="a", force=True, request_id="x")),
    ],
)
def test_options_reach_the_controller(
    cli: Cli, controller: FakeController, args: tuple[str, ...], request_: object
) -> None:
    cli(*args, "a")
    assert controller.requests == [request_]


@pytest.mark.parametrize("verb", ["stop", "restart"])
def test_grace_is_sent_only_where_it_is_given(cli: Cli, controller: FakeController, verb: str) -> None:
    cli(verb, "a", "--grace", "1.5")
    cli(verb, "a")
    with_grace, without = controller.requests
    assert with_grace.grace.ToTimedelta().total_seconds() == 1.5  # type: ignore[attr-defined]
    assert not without.HasField("grace")


def test_all_that_run_are_stopped(cli: Cli, controller: FakeController) -> None:
    controller.page_size_max = 2
    for name in ("a", "b", "c"):
        controller.add(name)
    controller.add("d", Instance.STOPPED)
    controller.add("e", Instance.FAILED)
    result = cli("stop", "--all")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "".join(f"{name}: stopped by the guest agent's shutdown\n" for name in "abc")
    assert cli("stop", "--all").output == ""


def test_what_has_not_stopped_within_the_budget_is_killed(cli: Cli, controller: FakeController) -> None:
    for name in ("a", "b", "c"):
        controller.add(name)
    controller.ignores_shutdown = {"a", "c"}
    result = cli("stop", "--all", "--timeout", "0.5")
    assert result.exit_code == 6
    assert result.stdout == "b: stopped by the guest agent's shutdown\n"
    assert result.stderr == "".join(f"vmherd: {name} did not stop within 0.5 s and was killed\n" for name in "ac")
    graces = [request.grace.ToTimedelta().total_seconds() for request in controller.requests if _is_gentle(request)]
    assert graces == [0.5] * 3
    assert {instance.state for instance in controller.instances.values()} == {Instance.STOPPED}


def test_who_goes_down_meanwhile_is_no_failure_of_a_stop_of_all(cli: Cli, controller: FakeController) -> None:
    controller.add("a")
    controller.errors["StopRequest"] = FailedPrecondition("not now")
    assert cli("stop", "--all").exit_code == 4  # it runs on
    controller.errors.clear()
    controller.ends_by_itself = {"a"}
    result = cli("stop", "--all")
    assert (result.exit_code, result.output) == (0, "a: stopped\n")
    assert cli("stop", "a").exit_code == 4


def test_force_needs_no_budget(cli: Cli, controller: FakeController) -> None:
    controller.add("a")
    controller.ignores_shutdown = {"a"}
    result = cli("stop", "--all", "--force", "--timeout", "9")
    assert (result.exit_code, result.stdout) == (0, "a: stopped by killing QEMU\n")


def test_an_update_says_only_what_is_to_change(cli: Cli, controller: FakeController) -> None:
    for name in ("a", "b"):
        controller.add(name)
    assert cli("update", "a", "b", "--autostart").stdout == "a: running\nb: running\n"
    assert cli("update", "b", "--no-autostart").exit_code == 0
    assert controller.requests[-1] == UpdateRequest(name="b", autostart=False)
    assert [controller.instances[name].autostart for name in ("a", "b")] == [True, False]
    assert "autostart" in cli("info", "a").stdout


def test_the_networks_of_the_host(cli: Cli, controller: FakeController) -> None:
    assert (cli("networks").exit_code, cli("networks").output) == (0, "")
    controller.networks = [Network(name="default", bridge="vmherd0", subnet="10.20.30.0/24", gateway="10.20.30.1")]
    _heading, line = cli("networks").stdout.splitlines()
    assert line.split()[:4] == ["default", "vmherd0", "10.20.30.0/24", "10.20.30.1"]
    assert json.loads(cli("networks", "--json").stdout)["networks"][0]["bridge"] == "vmherd0"


def test_delete_says_nothing_when_it_worked(cli: Cli, controller: FakeController) -> None:
    controller.add("a", Instance.STOPPED)
    result = cli("delete", "a")
    assert (result.exit_code, result.output) == (0, "")
    assert controller.instances == {}


def test_list_follows_the_pages(cli: Cli, controller: FakeController) -> None:
    controller.page_size_max = 2
    for name in ("a", "b", "c", "d", "e"):
        controller.add(name)
    result = cli("list", "--label", "tier", "--label", "zone=1")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["NAME", "a", "b", "c", "d", "e"]
    requests = [request for request in controller.requests if isinstance(request, ListRequest)]
    assert [request.page_token for request in requests] == ["", "b", "d"]
    assert all(request.label_selector == ["tier", "zone=1"] for request in requests)


def test_list_as_json_is_one_document_with_all_pages(cli: Cli, controller: FakeController) -> None:
    controller.page_size_max = 1
    controller.add("a")
    controller.add("b")
    (line,) = cli("list", "--json").stdout.splitlines()
    document = json.loads(line)
    assert [instance["name"] for instance in document["instances"]] == ["a", "b"]
    assert document["revision"] == "7"


def test_an_empty_list_prints_nothing_into_a_pipe(cli: Cli, controller: FakeController) -> None:
    result = cli("list")
    assert (result.exit_code, result.output) == (0, "")


def test_a_long_line_is_not_broken_in_a_pipe(cli: Cli, controller: FakeController) -> None:
    controller.add("a", labels={f"key{index}": "v" * 200 for index in range(5)})
    _heading, line = cli("list").stdout.splitlines()
    assert line.count("v" * 200) == 5


def test_info_shows_the_last_exit(cli: Cli, controller: FakeController) -> None:
    last = Exit(cause=Exit.CRASHED, detail="QEMU was ended by SIGKILL", stderr_tail="one\ntwo\x07")
    controller.add("a", Instance.FAILED, last_exit=last)
    result = cli("info", "a")
    assert "crashed: QEMU was ended by SIGKILL" in result.stdout
    assert "two\ufffd" in result.stdout
    assert "\x07" not in result.stdout


def test_wait_follows_until_the_condition_holds(cli: Cli, controller: FakeController) -> None:
    controller.add("a")
    result = cli("wait", "a", "--until", "agent")
    assert result.exit_code == 0
    assert result.stdout == "a: running\n"
    assert "agent" in result.stderr
    assert "address" not in result.stderr


def test_watch_prints_a_line_for_each_change(cli: Cli, controller: FakeController) -> None:
    controller.add("a")
    result = cli("watch", "a", "--from-revision", "0")
    first, second = (line.split() for line in result.stdout.splitlines())
    assert first[1:] == ["5", "a", "-", "running"]
    assert second[1:] == ["6", "a", "-", "deleted"]
    assert controller.requests == [WatchRequest(name="a")]


def test_watch_as_json_is_one_message_a_line(cli: Cli, controller: FakeController) -> None:
    controller.add("a")
    kinds = [json.loads(line)["kind"] for line in cli("watch", "--json").stdout.splitlines()]
    assert kinds == ["CURRENT", "SYNCED", "DELETED"]


def test_plan_prints_a_command_for_the_shell(cli: Cli, controller: FakeController) -> None:
    result = cli("plan", "web", "--cpus", "2")
    assert result.stdout == ("# TCG, as measured\nqemu-system-x86_64 \\\n  -name guest=web \\\n  -append 'a b'\n")
    assert controller.requests[0].launch.hardware == Hardware(cpus=2)  # type: ignore[attr-defined]


def test_plan_shows_what_a_network_would_need(cli: Cli, controller: FakeController) -> None:
    result = cli("plan", "web", "--network", "lan,address=10.0.0.9")
    assert result.stdout.splitlines()[:9] == [
        "# TCG, as measured",
        "# networks:",
        "#   lan, 10.0.0.9",
        "# devices:",
        "#   tap vm0 on br0",
        "# rules:",
        "#   chain port-vm0 {",
        "#     drop",
        "#   }",
    ]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DeadlineExceeded("time was up while waiting for the guest agent"), 6, "time was up"),
        (FailedPrecondition("it failed to start\nmeanwhile"), 4, "it failed to start meanwhile"),
        (Unavailable("the helper is away"), 5, "the helper is away"),
        (InternalError("incident 12"), 1, "incident 12"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    cli: Cli, controller: FakeController, error: Exception, code: int, text: str
) -> None:
    controller.errors["WaitRequest"] = error  # type: ignore[assignment]
    result = cli("wait", "a")
    assert result.exit_code == code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("vmherd: ")
    assert text in line


def test_an_error_as_json_is_the_status(cli: Cli, controller: FakeController) -> None:
    result = cli("info", "nobody", "--json")
    assert result.exit_code == 3
    status = json.loads(result.stderr)
    assert status["code"] == 5
    assert status["details"][0]["reason"] == "INSTANCE_NOT_FOUND"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("launch",), "Missing argument"),
        (("launch", "a", "--cpus", "-1"), "--cpus"),
        (("launch", "a", "--cpus", "many"), "--cpus"),
        (("launch", "a", "--label", "x"), "--label wants KEY=VALUE, got 'x'"),
        (("wait", "a", "--timeout", "inf"), "--timeout"),
        (("wait", "a", "--timeout", "nan"), "--timeout"),
        (("stop", "a", "--grace", "-1"), "--grace"),
        (("stop",), "name the instances to stop, or give --all"),
        (("stop", "a", "--all"), "name the instances to stop, or give --all"),
        (("stop", "--all", "--timeout", "-1"), "--timeout"),
        (("update", "a"), "--autostart or --no-autostart"),
        (("launch", "a", "--network", "mac=1"), "--network wants NAME"),
        (("launch", "a", "--forward", "ssh"), "--forward wants [HOST_PORT:]GUEST_PORT[/udp], got 'ssh'"),
        (("launch", "a", "--network", "lan", "--forward", "22"), "add `--network user`"),
        (("watch", "--from-revision", str(2**63)), "--from-revision"),
        (("stop", "a", "b", "--request-id", "x"), "--request-id stands for one request"),
        (("wait", "a", "--until", "lunch"), "lunch"),
        (("frobnicate",), "frobnicate"),
        (("list", "--frobnicate"), "--frobnicate"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_help(
    cli: Cli, controller: FakeController, args: tuple[str, ...], text: str
) -> None:
    result = cli(*args)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert text in line
    assert "--help`" in line
    assert controller.requests == []


def test_no_controller_says_how_to_start_one(rundir: Path, cli: Cli) -> None:
    result = cli("list")
    assert result.exit_code == 5
    assert str(rundir) in result.stderr
    assert "./start.sh" in result.stderr


def test_a_socket_that_nobody_serves_says_so(rundir: Path, cli: Cli) -> None:
    (rundir / "controller.sock").touch()
    result = cli("list")
    assert result.exit_code == 5
    assert result.stderr == (
        f"vmherd: no controller answers on {rundir}/controller.sock: Connection refused; "
        "`./start.sh` or `vmherd up` starts one\n"
    )


def test_rundir_may_stand_behind_the_command_or_in_the_environment(rundir: Path, controller: FakeController) -> None:
    controller.add("a")
    behind = CliRunner().invoke(app, ["list", "--rundir", str(rundir)])
    from_environment = CliRunner().invoke(app, ["list"], env={"VMHERD_RUNDIR": str(rundir)})
    assert behind.stdout == from_environment.stdout
    assert "a " in behind.stdout


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("vmherd info we", ["web-1", "web-2"]),
        ("vmherd stop d", ["db"]),
        ("vmherd launch x --network ", ["default", "user", "none"]),
        ("vmherd plan x --network u", ["user"]),
    ],
)
def test_names_are_completed(rundir: Path, controller: FakeController, words: str, completed: list[str]) -> None:
    for name in ("web-1", "web-2", "db"):
        controller.add(name)
    controller.networks = [Network(name="default", bridge="vmherd0")]
    environment = {
        "_VMHERD_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "VMHERD_RUNDIR": str(rundir),
    }
    result = CliRunner().invoke(app, [], prog_name="vmherd", env=environment)
    assert result.stdout.split() == completed


def _is_gentle(request: object) -> TypeGuard[StopRequest]:
    return isinstance(request, StopRequest) and not request.force


@pytest.mark.usefixtures("controller")
def test_a_directory_that_cannot_be_listed_has_a_socket_all_the_same(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK and access(path, mode))
    result = cli("list")
    assert (result.exit_code, result.stderr) == (0, "")
