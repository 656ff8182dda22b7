"""Why did QEMU end? One decision over what the helper, QEMU and the stop that was under way have to say."""

from __future__ import annotations

import re
import signal as signals

from vmherd.controller.helper import Process
from vmherd.model.instance import Cause, Exit, StopStep
from vmherd.model.lifecycle import Event

GUEST_PANIC = "guest-panic"
HOST_SIGNAL = "host-signal"
"""Reasons of QMP's SHUTDOWN event that do not mean a guest that ended in good order."""

STDERR_TAIL_MAX_CHARACTERS = 500

PRIVILEGED_PORTS = range(1024)

_NOT_BOUND = re.compile(r"Could not set up host forwarding rule '(tcp|udp):127\.0\.0\.1:(\d+)-[\d.]*:(\d+)'")
"""What QEMU says of a port forward before it exits."""

STOP_STEP_NAMES = {
    StopStep.AGENT: "the guest agent shut the guest down",
    StopStep.POWER_BUTTON: "the guest shut down at the power button",
    StopStep.QUIT: "QEMU quit",
    StopStep.KILL: "QEMU was killed",
}


def judge(
    process: Process, *, came_up: bool, stop_step: StopStep | None, stopping: bool, shutdown_reason: str
) -> tuple[Event, Exit]:
    """What an ended process means for its instance.

    `came_up` says whether QEMU had ever answered, `stop_step` which step of a stop was being tried, `stopping` whether
    a stop was under way at all, and `shutdown_reason` why QEMU said that it goes down, empty when it said nothing.
    """
    # An earlier controller may have got as far as the kill, and the next one does not know of its steps.
    while_away = stopping and stop_step is None
    killed_by_us = stop_step is StopStep.KILL or (while_away and process.signal == signals.SIGKILL)
    if shutdown_reason == GUEST_PANIC:
        event, cause, detail = Event.DIED, Cause.GUEST_PANIC, "the guest's kernel panicked; its console's log tells why"
    elif process.signal is not None and not killed_by_us:
        event, cause, detail = Event.DIED, Cause.CRASHED, f"QEMU was ended by {_signal_name(process.signal)}"
    elif process.exit_code:
        event, cause, detail = Event.DIED, Cause.CRASHED, f"QEMU exited with code {process.exit_code}"
    elif stop_step is not None:
        event, cause, detail = Event.ENDED, Cause.STOPPED, STOP_STEP_NAMES[stop_step]
    elif while_away and shutdown_reason != HOST_SIGNAL:
        event, cause, detail = Event.ENDED, Cause.STOPPED, "it ended during a stop, and nobody saw at which step"
    elif shutdown_reason == HOST_SIGNAL:
        event, cause, detail = Event.DIED, Cause.CRASHED, "somebody else told QEMU to terminate"
    elif shutdown_reason or process.exit_code == 0:
        event, cause, detail = Event.ENDED, Cause.GUEST_SHUTDOWN, "the guest shut itself down"
    else:
        event, cause, detail = Event.DIED, Cause.VANISHED, "QEMU is gone and nobody saw how it ended"
    if cause in (Cause.CRASHED, Cause.VANISHED):
        cause = cause if came_up or stopping else Cause.START_FAILED
        detail = _port_not_bound(process) or ": ".join([detail, *process.stderr_tail.splitlines()[-1:]])
    return event, Exit(
        cause=cause,
        detail=detail,
        ended_at_s=process.ended_at_s or 0.0,
        stop_step=stop_step if cause is Cause.STOPPED else None,
        exit_code=process.exit_code,
        signal=process.signal,
        stderr_tail=process.stderr_tail,
    )


def _port_not_bound(process: Process) -> str:
    """What to make of a port forward that QEMU could not set up; empty where there was none."""
    if not (found := _NOT_BOUND.search(process.stderr_tail)):
        return ""
    protocol, port, guest_port = found.groups()
    why = (
        "ports below 1024 are root's, which QEMU is not" if int(port) in PRIVILEGED_PORTS else "another program has it"
    )
    return f"QEMU cannot bind {protocol} port {port} of 127.0.0.1, which leads to the guest's port {guest_port}; {why}"


def short_tail(stderr_tail: str) -> str:
    """As much of QEMU's last words as an error has room for: errors travel in HTTP/2 headers, which hold 8 KiB."""
    return stderr_tail[-STDERR_TAIL_MAX_CHARACTERS:]


def _signal_name(number: int) -> str:
    try:
        return f"{signals.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
