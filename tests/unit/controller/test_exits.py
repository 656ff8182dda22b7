"""Why QEMU ended: every combination of evidence that was seen in practice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmherd.controller.exits import judge
from vmherd.controller.helper import Process
from vmherd.model.instance import Cause, StopStep
from vmherd.model.lifecycle import Event


def ended(exit_code: int | None = None, signal: int | None = None) -> Process:
    return Process("uid", 1, 42, ended_at_s=7.0, exit_code=exit_code, signal=signal, stderr_tail="tail")


@pytest.mark.parametrize(
    ("process", "stop_step", "stopping", "reason", "event", "cause"),
    [
        (ended(0), StopStep.AGENT, True, "guest-shutdown", Event.ENDED, Cause.STOPPED),
        (ended(0), StopStep.QUIT, True, "host-qmp-quit", Event.ENDED, Cause.STOPPED),
        (ended(signal=9), StopStep.KILL, True, "", Event.ENDED, Cause.STOPPED),
        (ended(), StopStep.KILL, True, "", Event.ENDED, Cause.STOPPED),
        (ended(signal=9), StopStep.AGENT, True, "", Event.DIED, Cause.CRASHED),
        (ended(signal=11), None, False, "", Event.DIED, Cause.CRASHED),
        (ended(1), None, False, "", Event.DIED, Cause.CRASHED),
        (ended(0), None, False, "guest-shutdown", Event.ENDED, Cause.GUEST_SHUTDOWN),
        (ended(0), None, False, "", Event.ENDED, Cause.GUEST_SHUTDOWN),
        (ended(0), None, False, "guest-panic", Event.DIED, Cause.GUEST_PANIC),
        (ended(0), StopStep.AGENT, True, "guest-panic", Event.DIED, Cause.GUEST_PANIC),
        (ended(0), None, False, "host-signal", Event.DIED, Cause.CRASHED),
        (ended(), None, False, "guest-shutdown", Event.ENDED, Cause.GUEST_SHUTDOWN),
        (ended(), None, True, "", Event.ENDED, Cause.STOPPED),
        (ended(signal=9), None, True, "", Event.ENDED, Cause.STOPPED),
        (ended(signal=11), None, True, "", Event.DIED, Cause.CRASHED),
        (ended(signal=9), None, False, "", Event.DIED, Cause.CRASHED),
        (ended(), None, False, "", Event.DIED, Cause.VANISHED),
    ],
)
def test_judge(
    process: Process, stop_step: StopStep | None, stopping: bool, reason: str, event: Event, cause: Cause
) -> None:
    happened, exit_ = judge(process, came_up=True, stop_step=stop_step, stopping=stopping, shutdown_reason=reason)
    assert (happened, exit_.cause) == (event, cause)
    assert exit_.stop_step == (stop_step if cause is Cause.STOPPED else None)
    assert (exit_.exit_code, exit_.signal, exit_.stderr_tail) == (process.exit_code, process.signal, "tail")
    assert exit_.detail
    assert exit_.ended_at_s == 7.0


@pytest.mark.parametrize("process", [ended(1), ended(signal=6), ended()])
def test_a_qemu_that_never_answered_did_not_start(process: Process) -> None:
    happened, exit_ = judge(process, came_up=False, stop_step=None, stopping=False, shutdown_reason="")
    assert (happened, exit_.cause) == (Event.DIED, Cause.START_FAILED)
    assert exit_.detail.endswith(": tail")


@pytest.mark.parametrize(
    ("port", "why"),
    [(8022, "another program has it"), (22, "ports below 1024 are root's, which QEMU is not")],
    ids=["taken", "privileged"],
)
def test_a_port_that_qemu_cannot_bind_is_named(port: int, why: str) -> None:
    said = (
        f"qemu-system-x86_64: -netdev user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:22: "
        f"Could not set up host forwarding rule 'tcp:127.0.0.1:{port}-:22'\n"
    )
    process = replace(ended(1), stderr_tail=said)
    _, exit_ = judge(process, came_up=False, stop_step=None, stopping=False, shutdown_reason="")
    assert exit_.cause is Cause.START_FAILED
    assert exit_.detail == f"QEMU cannot bind tcp port {port} of 127.0.0.1, which leads to the guest's port 22; {why}"


def test_a_signal_is_named() -> None:
    _, exit_ = judge(ended(signal=11), came_up=True, stop_step=None, stopping=False, shutdown_reason="")
    assert "SIGSEGV (signal 11)" in exit_.detail
