from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from vmherd.api.v1.controller_pb2 import Network, PlanResponse, WaitResponse
from vmherd.api.v1.instance_pb2 import Address, Exit, Hardware, Instance, Nic, PortForward, Readiness
from vmherd.cli import show
from vmherd.cli.report import printable

SSH = PortForward(guest_port=22, host_port=40001)
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


def test_the_details_show_networks_and_who_told_the_addresses() -> None:
    mac = "52:00:00:00:00:01"
    dns = PortForward(guest_port=53, protocol=PortForward.UDP)
    instance = Instance(
        nics=[
            Nic(network="default", mac=mac, ipv4_address="10.20.30.2", ipv6_address="fd00::1"),
            Nic(network="user", mac="52:00:00:00:00:02", forwards=[SSH, dns]),
        ],
        addresses=[
            Address(address="10.0.2.15", prefix_length=24, mac=mac, interface="eth1", source=Address.AGENT),
            Address(address="10.20.30.2", prefix_length=24, mac=mac, source=Address.LEASE),
        ],
        autostart=True,
    )
    lines = [line.strip() for line in shown(show.instance_details(instance)).splitlines()]
    assert f"networks   default, {mac}, 10.20.30.2, fd00::1" in lines
    assert "user, 52:00:00:00:00:02, 127.0.0.1:40001 → 22/tcp, 127.0.0.1:* → 53/udp" in lines
    assert f"addresses  10.0.2.15/24 on eth1, {mac} (agent)" in lines
    assert f"10.20.30.2/24, {mac} (lease)" in lines
    assert "autostart  when the host has booted" in lines


def test_networks_say_whose_addresses_they_have() -> None:
    ours = Network(
        name="default", bridge="vmherd0", subnet="10.20.30.0/24", gateway="10.20.30.1", ipv6_subnet="fd00::/64"
    )
    others = Network(name="lan", bridge="br0", isolated=True)
    heading, first, second = shown(show.network_table([ours, others])).splitlines()
    assert heading.split() == ["NAME", "BRIDGE", "SUBNET", "HOST", "IPV6", "SUBNET", "INSTANCES"]
    assert first.split() == [
        *("default", "vmherd0", "10.20.30.0/24", "10.20.30.1", "fd00::/64"),
        *("reach", "each", "other"),
    ]
    assert second.split() == ["lan", "br0", "somebody", "else's", "-", "-", "isolated"]


def test_the_table_has_a_line_for_each_instance() -> None:
    instance = Instance(
        name="web",
        state=Instance.RUNNING,
        readiness=Readiness(reached=Readiness.AGENT),
        addresses=[
            Address(address="10.0.2.15", source=Address.AGENT),
            Address(address="fe80::1", source=Address.NEIGHBOUR),
        ],
        nics=[Nic(network="default"), Nic(network="user", forwards=[SSH])],
        hardware=Hardware(cpus=2, memory_mib=256),
        image="builtin",
        labels={"b": "2", "a": "1"},
        create_time=Timestamp(seconds=int(NOW.timestamp()) - 90),
    )
    heading, line = shown(show.instance_table([instance], NOW)).splitlines()
    assert heading.split() == [
        *("NAME", "STATE", "READY", "ADDRESSES", "NETWORKS", "CPUS", "MEMORY", "IMAGE", "AGE", "LABELS")
    ]
    assert line.split() == [
        "web",
        "running",
        "agent",
        "10.0.2.15,",
        "fe80::1",
        "(neighbour)",
        "default,",
        "user",
        "127.0.0.1:40001",
        "→",
        "22/tcp",
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
            Instance(
                name="a",
                state=Instance.RUNNING,
                addresses=[Address(address="10.0.2.15")],
                nics=[Nic(network="user", forwards=[SSH])],
            ),
            "a: running at 10.0.2.15, 127.0.0.1:40001 → 22/tcp",
        ),
        (Instance(name="a", state=Instance.STOPPED, nics=[Nic(network="user", forwards=[SSH])]), "a: stopped"),
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


def test_an_address_that_comes_before_the_agent_is_followed_like_any_other_rung() -> None:
    qmp, agent, address = step(Readiness.QMP, 110), step(Readiness.AGENT, 2340), step(Readiness.ADDRESS, 1500)
    ladders = [[qmp], [qmp, address], [qmp, agent, address]]
    answers = [WaitResponse(instance=Instance(name="a", readiness=Readiness(steps=steps))) for steps in ladders]
    stream = io.StringIO()
    show.follow(answers, show.open_console(stream))
    assert stream.getvalue() == "qmp      0.11 s\naddress  1.50 s\nagent    2.34 s\n"


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


def test_a_plan_shows_networks_devices_and_rules_as_comments() -> None:
    nic = Nic(network="default", mac="52:00:00:00:00:01", ipv4_address="10.20.30.2")
    plan = PlanResponse(
        argv=["qemu"],
        accelerator="TCG",
        instance=Instance(nics=[nic]),
        devices=["tap vm0"],
        rules=["table inet vmherd {\n\tchain forward {}\n}\x1b"],
    )
    assert show.plan_text(plan).splitlines() == [
        "# TCG",
        "# networks:",
        "#   default, 52:00:00:00:00:01, 10.20.30.2",
        "# devices:",
        "#   tap vm0",
        "# rules:",
        "#   table inet vmherd {",
        "#     chain forward {}",
        "#   }\ufffd",
        "qemu",
    ]
