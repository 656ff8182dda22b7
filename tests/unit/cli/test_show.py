from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from vmherd.api.v1.controller_pb2 import PlanResponse, WaitResponse
from vmherd.api.v1.instance_pb2 import Address, Exit, Hardware, Instance, Readiness
from vmherd.cli import show
from vmherd.cli.report import printable

NOW = datetime(2030, 1, 2, tzinfo=UTC)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(renderable: object) -> str:
    stream = io.StringIO()
    show.open_console(stream).print(renderable)
    return stream.getvalue()


def step(rung: Readiness.Rung.ValueType, milliseconds: int) -> Readiness.Step:
    elapsed = Duration()
    elapsed.FromMilliseconds(milliseconds)
    return Readiness.Step(rung=rung, elapsed=elapsed)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain ä", "plain ä"),
        ("\x1b[2Jgone", "\ufffd[2Jgone"),
        ("two\nlines\ttabs", "two lines tabs"),
        ("\x9b2J \u202e", "\ufffd2J \ufffd"),
    ],
)
def test_no_control_character_reaches_the_terminal(text: str, printed: str) -> None:
    assert printable(text) == printed


def test_what_a_guest_says_is_not_read_as_markup() -> None:
    instance = Instance(name="a", addresses=[Address(address="[red]1[/red]", interface="[bold]")])
    table = shown(show.instance_table([instance], NOW))
    assert "[red]1[/red]" in table
    assert "[bold]" in shown(show.instance_details(instance))


def test_the_details_of_a_frozen_instance_say_until_when() -> None:
    assert "frozen" not in shown(show.instance_details(Instance(name="web")))
    frozen = Instance(name="web", frozen_until=Timestamp(seconds=int(NOW.timestamp())))
    assert "frozen until  2030-01-02 00:00:00+00:00" in shown(show.instance_details(frozen))


def test_the_table_has_a_line_for_each_instance() -> None:
    instance = Instance(
        name="web",
        state=Instance.RUNNING,
        readiness=Readiness(reached=Readiness.AGENT),
        addresses=[Address(address="10.0.2.15"), Address(address="fe80::1")],
        hardware=Hardware(cpus=2, memory_mib=256),
        image="builtin",
        labels={"b": "2", "a": "1"},
        create_time=Timestamp(seconds=int(NOW.timestamp()) - 90),
    )
    heading, line = shown(show.instance_table([instance], NOW)).splitlines()
    assert heading.split() == ["NAME", "STATE", "READY", "ADDRESSES", "CPUS", "MEMORY", "IMAGE", "AGE", "LABELS"]
    assert line.split() == [
        "web",
        "running",
        "agent",
        "10.0.2.15,",
        "fe80::1",
        "2",
        "256",
        "MiB",
        "builtin",
        "1m",
        "a=1,b=2",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (86400, "1d"), (864000, "10d")],
)
def test_age_is_one_whole_unit(seconds: float, text: str) -> None:
    assert show.age(seconds) == text


@pytest.mark.parametrize(
    ("instance", "line"),
    [
        (Instance(name="a", state=Instance.STOPPED), "a: stopped"),
        (
            Instance(name="a", state=Instance.RUNNING, addresses=[Address(address="10.0.2.15")]),
            "a: running at 10.0.2.15",
        ),
        (
            Instance(name="a", state=Instance.STOPPED, last_exit=Exit(cause=Exit.STOPPED, stop_step=Exit.QUIT)),
            "a: stopped by telling QEMU to quit",
        ),
        (
            Instance(name="a", state=Instance.RUNNING, last_exit=Exit(cause=Exit.STOPPED, stop_step=Exit.QUIT)),
            "a: running",
        ),
        (
            Instance(name="a", state=Instance.FAILED, last_exit=Exit(detail="ended by SIGKILL")),
            "a: failed: ended by SIGKILL",
        ),
    ],
)
def test_summary_says_where_the_instance_is(instance: Instance, line: str) -> None:
    assert show.summary(instance) == line


def test_every_state_and_stop_step_has_its_look() -> None:
    assert set(show.STOP_STEPS) == set(Exit.StopStep.values()) - {Exit.STOP_STEP_UNSPECIFIED}
    assert set(show.STATE_STYLES) == set(Instance.State.values()) - {Instance.STATE_UNSPECIFIED, Instance.STOPPED}


def test_a_wait_is_followed_rung_by_rung_in_a_pipe() -> None:
    steps = [step(Readiness.PROCESS, 20), step(Readiness.QMP, 110), step(Readiness.AGENT, 2340)]
    answers = [
        WaitResponse(instance=Instance(name="a", readiness=Readiness(steps=steps[:count])), waiting_for="more")
        for count in (0, 1, 1, 3)
    ]
    stream = io.StringIO()
    last = show.follow(answers, show.open_console(stream))
    assert stream.getvalue() == "process  0.02 s\nqmp      0.11 s\nagent    2.34 s\n"
    assert last == answers[-1].instance


def test_a_wait_is_followed_live_on_a_terminal() -> None:
    answers = [
        WaitResponse(
            instance=Instance(readiness=Readiness(steps=[step(Readiness.PROCESS, 20)])), waiting_for="the agent"
        ),
        WaitResponse(
            instance=Instance(readiness=Readiness(steps=[step(Readiness.PROCESS, 20), step(Readiness.QMP, 110)]))
        ),
    ]
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=80)
    last = show.follow(answers, console)
    final = stream.getvalue().rpartition("waiting for")[2]
    assert "qmp" in final
    assert last == answers[-1].instance


def test_a_plan_can_be_pasted_into_a_shell() -> None:
    plan = PlanResponse(argv=["qemu", "-append", "console=ttyS0 a'b", "-nodefaults"], accelerator="TCG\x1b")
    assert show.plan_text(plan) == ("# TCG\ufffd\nqemu \\\n  -append 'console=ttyS0 a'\"'\"'b' \\\n  -nodefaults")
