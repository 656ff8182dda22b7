"""Carries out one accepted command: acts on QEMU, the helper, the agent and the disk, and tells the supervisor.

Every function here may be cut off at any moment and begun again from the instance's record, by the next controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

import structlog

from vmherd.controller.admission import check_state
from vmherd.controller.exits import short_tail
from vmherd.controller.freeze import Freezer
from vmherd.controller.helper import Process
from vmherd.controller.monitor import Monitor
from vmherd.controller.world import World
from vmherd.guest_agent import AgentError, AgentFrozen, GuestAgent
from vmherd.guest_agent.holding import uninterrupted
from vmherd.image.errors import ImageError
from vmherd.image.registry import KernelImage
from vmherd.model.errors import Aborted, DeadlineExceeded, FailedPrecondition, NotFound, Unavailable, VmherdError
from vmherd.model.instance import Cause, Exit, Instance, NetworkInterface, Operation, StopStep, Verb
from vmherd.model.layout import StateDirectory
from vmherd.model.lifecycle import ACTIVE, Event, State
from vmherd.model.machine import Disk, DiskFormat, KernelBoot, Machine, Nic, NicBackend
from vmherd.model.readiness import Rung
from vmherd.rpc.interceptors import unexpected

_log = structlog.get_logger()

UNDER_CONTROL_TIMEOUT_S = 15.0
"""From a QEMU process to its answer on the control socket; it takes some 0.1 s on an idle host."""

END_TIMEOUT_S = 5.0
"""From telling QEMU to quit, or killing it, to its end."""

TOGGLE_TIMEOUT_S = 5.0
QMP_RETURN_TIMEOUT_S = 5.0
AGENT_TIMEOUT_S = 5.0
WAKE_TIMEOUT_S = 10.0
"""From waking a guest to its agent's answer."""

HELPER_RETRY_S = 0.2
DISK_BYTES = 1 << 30
"""Size of the empty disk that an instance of a kernel image gets; the file is sparse."""

T = TypeVar("T")


class Driven(Protocol):
    """The supervisor's side of a command: what is known of the instance, and who is told what happens."""

    world: World
    monitor: Monitor
    freezer: Freezer
    ended: asyncio.Event
    stop_step: StopStep | None

    @property
    def instance(self) -> Instance:
        """The instance as it is now."""

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition on this instance holds."""

    def open_agent(self) -> GuestAgent:
        """The guest agent's client; raises `FailedPrecondition` when the instance does not run."""

    def process_seen(self, process: Process) -> None:
        """The helper knows this process."""

    def process_not_seen(self) -> None:
        """The helper knows no process of this instance."""

    def process_started(self, process: Process) -> None:
        """The helper has answered a start with this process."""

    async def start_again(self) -> None:
        """The first half of a restart is done."""

    async def start_failed(self, exit_: Exit) -> None:
        """There is no process, and there will be none."""


async def carry_out(operation: Operation, supervisor: Driven) -> VmherdError | None:
    """Carries out a command to its end, or to an error; the supervisor knows what state that left."""
    try:
        await _STEPS[operation.verb](operation, supervisor)
    except VmherdError as error:
        return error
    except Exception as error:
        return unexpected(f"{operation.verb} of {supervisor.instance.name!r}", error)
    return None


async def toggle(supervisor: Driven, event: Event) -> None:
    """Pauses, resumes or wakes a machine; answers when QEMU says that it has.

    Raises:
        FailedPrecondition: the instance's state forbids it.
        VmherdError: QEMU cannot be asked, refused or did not do it in time.
    """
    verb, name, before = event.name.lower(), supervisor.instance.name, supervisor.instance.state
    check_state(supervisor.instance, event, verb)
    await supervisor.monitor.execute(_TOGGLES[before])
    try:
        async with asyncio.timeout(TOGGLE_TIMEOUT_S):
            await supervisor.until(lambda: supervisor.instance.state != before)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"QEMU took the {verb} of {name!r} and did not carry it out within {TOGGLE_TIMEOUT_S:g} s",
            reason="PAUSE_TIMEOUT",
            metadata={"name": name},
        ) from error


_TOGGLES = {State.RUNNING: "stop", State.PAUSED: "cont", State.SUSPENDED: "system_wakeup"}
"""QEMU's command that leads out of a state."""


async def _start(_: Operation, supervisor: Driven) -> None:
    path = supervisor.world.state.instance(supervisor.instance.uid)
    try:
        await _in_thread(partial(_make_disk, path.path, path.disk))
    except OSError as error:
        raise await _start_failed(supervisor, f"cannot make the disk {path.disk}: {error.strerror}") from error
    if supervisor.instance.state in ACTIVE:  # a launch may be without a start
        await _bring_up(supervisor)


async def _stop(operation: Operation, supervisor: Driven) -> None:
    await _bring_down(operation, supervisor)


async def _restart(operation: Operation, supervisor: Driven) -> None:
    await _bring_down(operation, supervisor)
    await supervisor.start_again()
    await _bring_up(supervisor)


async def _delete(operation: Operation, supervisor: Driven) -> None:
    await _bring_down(operation, supervisor)
    uid = supervisor.instance.uid
    await _with_helper(supervisor, lambda: supervisor.world.helper.release(uid))
    path = supervisor.world.state.instance(uid).path
    try:
        await _in_thread(partial(shutil.rmtree, path))
    except FileNotFoundError:
        pass  # an earlier try got this far
    except OSError as error:
        raise Aborted(f"cannot remove {path}: {error.strerror}: {error.filename}", reason="DISK_NOT_REMOVED") from error


_STEPS: dict[Verb, Callable[[Operation, Driven], Awaitable[None]]] = {
    Verb.LAUNCH: _start,
    Verb.START: _start,
    Verb.STOP: _stop,
    Verb.RESTART: _restart,
    Verb.DELETE: _delete,
}


def machine_of(instance: Instance, image: KernelImage, state: StateDirectory) -> Machine:
    """The machine that the helper is asked to run for an instance."""
    return Machine(
        uid=instance.uid,
        name=instance.name,
        generation=instance.generation,
        cpus=instance.hardware.cpus,
        memory_mib=instance.hardware.memory_mib,
        kernel_boot=KernelBoot(
            kernel=str(image.kernel),
            initramfs=str(image.initramfs),
            command_line=f"{image.command_line} vmherd.hostname={instance.name}",
        ),
        disks=(Disk(str(state.instance(instance.uid).disk), DiskFormat.RAW),),
        nics=tuple(map(_nic, instance.nics)),
    )


def _nic(nic: NetworkInterface) -> Nic:
    if nic.on_bridge:
        return Nic(nic.mac, NicBackend.BRIDGE, nic.network, nic.ipv4_address)
    return Nic(nic.mac, NicBackend.USER, forwards=nic.forwards)


async def _in_thread(work: Callable[[], None]) -> None:
    """Does blocking work to its end, also when cancelled: two must not be at work on one instance's files."""
    await uninterrupted(asyncio.to_thread(work))


def _make_disk(directory: os.PathLike[str], disk: os.PathLike[str]) -> None:
    # A helper that is root gives both to the user of the machine at its start, and lets the group of this process in.
    os.makedirs(directory, mode=0o700, exist_ok=True)
    descriptor = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not os.fstat(descriptor).st_size:  # what a guest wrote is never cut off
            os.ftruncate(descriptor, DISK_BYTES)
    finally:
        os.close(descriptor)


async def _bring_up(supervisor: Driven) -> None:
    world, instance = supervisor.world, supervisor.instance
    try:
        machine = machine_of(instance, world.images.get(instance.image), world.state)
        process = await _with_helper(supervisor, lambda: world.helper.start(machine))
    except (VmherdError, ImageError) as error:
        raise await _start_failed(supervisor, str(error)) from error
    supervisor.process_started(process)
    try:
        async with asyncio.timeout(UNDER_CONTROL_TIMEOUT_S):
            await supervisor.until(lambda: supervisor.ended.is_set() or _under_control(supervisor.instance))
    except TimeoutError as error:
        await _kill(supervisor)
        detail = f"QEMU did not answer on its control socket within {UNDER_CONTROL_TIMEOUT_S:g} s and was killed"
        raise await _start_failed(supervisor, detail) from error
    exit_ = supervisor.instance.last_exit
    if supervisor.instance.state is State.FAILED and exit_:
        raise _not_started(instance.name, exit_)


def _under_control(instance: Instance) -> bool:
    return (instance.readiness.reached or 0) >= Rung.QMP


async def _start_failed(supervisor: Driven, detail: str) -> Aborted:
    exit_ = Exit(Cause.START_FAILED, detail, ended_at_s=time.time())
    await supervisor.start_failed(exit_)
    return _not_started(supervisor.instance.name, exit_)


def _not_started(name: str, exit_: Exit) -> Aborted:
    tail = short_tail(exit_.stderr_tail)
    return Aborted(
        f"{name!r} did not start: {exit_.detail}; mend that and start it again, or delete it",
        reason="START_FAILED",
        metadata={"name": name} | ({"stderr_tail": tail} if tail else {}),
    )


async def _bring_down(operation: Operation, supervisor: Driven) -> None:
    """Climbs down the ladder of a stop until QEMU has ended; `Supervisor.stop_step` says where it stands."""
    if not operation.force and _under_control(supervisor.instance):
        await _give_qemu_time_to_answer(supervisor)
    grace_s = supervisor.world.stop_grace_s if operation.grace_s is None else operation.grace_s
    for step in (StopStep.KILL,) if operation.force else StopStep:
        await _until_somebody_answers(supervisor, step)
        if supervisor.ended.is_set():
            return
        supervisor.stop_step = step
        try:
            async with asyncio.timeout(grace_s if step in GRACEFUL else END_TIMEOUT_S):
                await _LADDER[step](supervisor)
                await supervisor.ended.wait()
        except (VmherdError, AgentError) as error:
            _log.info("a step of a stop failed", name=supervisor.instance.name, step=step.name, why=str(error))
        except TimeoutError:
            _log.info("a step of a stop took too long", name=supervisor.instance.name, step=step.name)
    if not supervisor.ended.is_set():
        raise DeadlineExceeded(
            f"{supervisor.instance.name!r} did not stop: not even SIGKILL ended QEMU; its host may wait for storage",
            reason="STOP_FAILED",
            metadata={"name": supervisor.instance.name},
        )


async def _until_somebody_answers(supervisor: Driven, step: StopStep) -> None:
    """Waits for one who can carry the step out, or say that there is nothing left to stop.

    It may take long: a stop that was accepted is not given up because nobody can be asked.
    """
    helper, monitor = supervisor.world.helper, supervisor.monitor
    await supervisor.until(
        lambda: supervisor.ended.is_set() or helper.connected or (monitor.up and step is not StopStep.KILL)
    )


async def _give_qemu_time_to_answer(supervisor: Driven) -> None:
    """Lets a new controller find QEMU again; otherwise it would go straight for the kill."""
    await _until_somebody_answers(supervisor, StopStep.AGENT)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(QMP_RETURN_TIMEOUT_S):
            await supervisor.until(lambda: supervisor.ended.is_set() or supervisor.monitor.up)


async def _ask_agent(supervisor: Driven) -> None:
    await _let_run(supervisor)
    agent = supervisor.open_agent()
    try:
        await agent.send("guest-shutdown", timeout_s=AGENT_TIMEOUT_S)
    except AgentFrozen:
        # It refused. The power button would be no way out: the guest would hang on its frozen file systems.
        await supervisor.freezer.thaw(timeout_s=AGENT_TIMEOUT_S)
        await agent.send("guest-shutdown", timeout_s=AGENT_TIMEOUT_S)


async def _let_run(supervisor: Driven) -> None:
    """Continues a guest that is paused and wakes one that is suspended, for neither hears anything."""
    await supervisor.monitor.execute("cont")
    if await supervisor.monitor.suspended():
        await supervisor.monitor.execute("system_wakeup")
        async with asyncio.timeout(WAKE_TIMEOUT_S):
            await supervisor.until(
                lambda: supervisor.ended.is_set() or (supervisor.instance.readiness.reached or 0) >= Rung.AGENT
            )


async def _press_power_button(supervisor: Driven) -> None:
    await supervisor.monitor.execute("system_powerdown")


async def _tell_qemu_to_quit(supervisor: Driven) -> None:
    await supervisor.monitor.execute("quit")


async def _kill(supervisor: Driven) -> None:
    uid, generation = supervisor.instance.uid, supervisor.instance.generation
    try:
        process = await _with_helper(supervisor, lambda: supervisor.world.helper.kill(uid, generation))
    except (NotFound, FailedPrecondition):  # there is none, or that of an earlier start, which has ended
        supervisor.process_not_seen()
    else:
        supervisor.process_seen(process)


_LADDER: dict[StopStep, Callable[[Driven], Awaitable[None]]] = {
    StopStep.AGENT: _ask_agent,
    StopStep.POWER_BUTTON: _press_power_button,
    StopStep.QUIT: _tell_qemu_to_quit,
    StopStep.KILL: _kill,
}

GRACEFUL = frozenset({StopStep.AGENT, StopStep.POWER_BUTTON})
"""Steps that leave the guest the time of the stop's grace; the others are QEMU's own work."""


async def _with_helper(supervisor: Driven, call: Callable[[], Awaitable[T]]) -> T:
    """Makes a call that the helper takes any number of times, again until it was there to take it."""
    while True:
        try:
            return await call()
        except (Unavailable, DeadlineExceeded):
            await asyncio.sleep(HELPER_RETRY_S)
            await supervisor.world.helper.wait_connected()
