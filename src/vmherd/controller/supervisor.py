"""One instance, supervised by one task.

Everything that happens to an instance becomes a message in its inbox: accepted commands, what QEMU and the helper
tell, what the guest agent answers. One task takes them in turn and is the only writer of the instance's record, so
nothing here needs a lock. What takes long is done by tasks beside it that act and tell the inbox: `driver` carries a
command out, `probe` looks for the guest agent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace

import structlog
from google.protobuf import json_format

from vmherd.controller import driver, requests
from vmherd.controller.admission import admit, check_state
from vmherd.controller.exits import judge
from vmherd.controller.helper import Helper, Process
from vmherd.controller.monitor import AGENT_PORT, Monitor
from vmherd.controller.probe import probe
from vmherd.controller.records import Outcome, Request, encode_instance, instance_key
from vmherd.controller.store import Put, Store, StoreError
from vmherd.guest_agent import GuestAgent
from vmherd.image.registry import ImageRegistry
from vmherd.model import lifecycle
from vmherd.model.errors import (
    Aborted,
    DeadlineExceeded,
    InternalError,
    VmherdError,
    illegal_transition,
)
from vmherd.model.instance import Address, Exit, Instance, Operation, StopStep, Verb, started
from vmherd.model.layout import RunDirectory, StateDirectory
from vmherd.model.lifecycle import Event, State
from vmherd.model.readiness import Readiness, Rung
from vmherd.rpc.status import to_status

_log = structlog.get_logger()

STARTING_VERBS = frozenset({Verb.LAUNCH, Verb.START})
STOPPING_VERBS = frozenset({Verb.STOP, Verb.RESTART})
AGENT_STATES = frozenset({State.RUNNING, State.STOPPING})
"""States in which a guest agent can answer."""

PAUSE_TIMEOUT_S = 5.0
STORE_RETRY_S = 1.0


@dataclass(frozen=True)
class World:
    """What every supervisor works with."""

    store: Store
    helper: Helper
    images: ImageRegistry
    run: RunDirectory
    state: StateDirectory
    stop_grace_s: float


class Supervisor:
    """Supervises one instance."""

    def __init__(self, world: World, instance: Instance, revision: int) -> None:
        run = world.run.instance(instance.uid)
        self.world = world
        self.instance = instance
        self.revision = revision
        self.deleted = False
        self.ended = asyncio.Event()
        """Set while no QEMU process of the current generation can be alive."""
        self.stop_step: StopStep | None = None
        self.agent = GuestAgent(run.agent)
        self.agent_open = False
        """Whether somebody in the guest holds the agent's port open."""
        self.monitor = Monitor(run.qmp, instance.name, self)
        self._inbox: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._outcomes: dict[str, asyncio.Future[Outcome]] = {}
        self._driving: asyncio.Task[None] | None = None
        self._monitoring: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._shutdown_reason = ""
        if instance.state not in lifecycle.ACTIVE:
            self.ended.set()
        if instance.operation:
            self._outcomes[instance.operation.id] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Supervises until the instance is deleted or the task cancelled; takes up what an earlier task left."""
        if self.instance.state in lifecycle.ACTIVE:
            self._monitoring = asyncio.create_task(self.monitor.run())
        if self.instance.operation:
            self._drive(self.instance.operation)
        try:
            while not self.deleted:
                message = await self._inbox.get()
                try:
                    await message()
                except Exception:
                    # A defect in one message must not leave the instance without anybody who listens.
                    _log.exception("a message was not handled", name=self.instance.name)
        finally:
            for task in (self._driving, self._monitoring, self._probing):
                await _cancelled(task)
            await self.agent.close()

    # What the herd asks of it.

    async def submit(self, operation: Operation, request: Request | None = None) -> Outcome:
        """Accepts a command, carries it out and says what came of it. A cancelled caller stops nothing.

        Raises:
            FailedPrecondition: the instance's state forbids it.
            StoreError: it could not be stored, or the request's id was used in the meantime (`Conflict`).
        """
        accepted: asyncio.Future[asyncio.Future[Outcome]] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(lambda: self._accept(operation, request, accepted))
        return await asyncio.shield(await accepted)

    async def outcome(self, operation_id: str) -> Outcome:
        """Waits for what comes of a command that is under way; raises `LookupError` when it is not."""
        return await asyncio.shield(self._outcomes[operation_id])

    async def pause(self) -> None:
        """Halts the virtual CPUs."""
        await self._toggle(Event.PAUSE, "pause", "stop")

    async def resume(self) -> None:
        """Lets the virtual CPUs run on."""
        await self._toggle(Event.RESUME, "resume", "cont")

    def open_agent(self) -> GuestAgent:
        """The guest agent's client, for a command right now.

        Raises:
            FailedPrecondition: the instance does not run.
        """
        if self.instance.state not in AGENT_STATES:
            raise illegal_transition(self.instance.name, "ask the guest agent of", self.instance.state, AGENT_STATES)
        return self.agent

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of the instance; another one stands here from then on."""
        return self._changed

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition on this supervisor holds."""
        while not condition():
            await self._changed.wait()

    async def tell(self, message: Callable[[], Awaitable[None]]) -> None:
        """Puts a message into the inbox and waits until it was handled."""
        handled = asyncio.Event()

        async def handle() -> None:
            try:
                await message()
            finally:
                handled.set()

        self._inbox.put_nowait(handle)
        await handled.wait()

    # What the helper tells (`helper.Listener`, one instance's part of it).

    def process_seen(self, process: Process) -> None:
        """The helper knows this process."""
        self._inbox.put_nowait(lambda: self._on_process(process))

    def process_not_seen(self) -> None:
        """The helper was reached and knows no process of this instance."""
        self._inbox.put_nowait(self._on_no_process)

    def helper_lost(self) -> None:
        """The helper cannot be reached."""
        self._inbox.put_nowait(self._on_lost)

    # What QEMU tells (`monitor.Sink`).

    def qmp_up(self, *, paused: bool, agent_open: bool) -> None:
        """QEMU answers; this is how it is."""
        self._inbox.put_nowait(lambda: self._on_qmp_up(paused=paused, agent_open=agent_open))

    def qmp_down(self) -> None:
        """QEMU hung up. Whether it ended is for the helper to say."""
        self._inbox.put_nowait(self._on_lost)

    def qmp_event(self, name: str, data: Mapping[str, object]) -> None:
        """QEMU has told an event."""
        if name in self._EVENTS:
            self._inbox.put_nowait(lambda: self._EVENTS[name](self, data))

    # What the probe tells.

    async def agent_answered(self) -> None:
        """The guest agent has answered."""
        if self.agent_open:
            await self._save(replace(self.instance, readiness=self._climbed(Rung.AGENT)))

    async def addresses_seen(self, addresses: tuple[Address, ...]) -> None:
        """The guest agent has told the guest's addresses."""
        if self.agent_open:
            readiness = self._climbed(Rung.ADDRESS) if addresses else self.instance.readiness.fall(Rung.AGENT)
            await self._save(replace(self.instance, addresses=addresses, readiness=readiness))

    # What the driver tells.

    async def start_again(self) -> None:
        """The first half of a restart is done: from here on it is a start."""
        operation = self.instance.operation
        if operation and operation.verb is Verb.RESTART:
            self._forget_last_run()
            await self._save(self._begun(replace(self.instance, operation=replace(operation, verb=Verb.START))))

    async def start_failed(self, exit_: Exit) -> None:
        """There is no process, and there will be none."""
        await self._on_end(Event.START_FAILED, exit_)

    # Messages: commands.

    async def _accept(
        self, asked: Operation, request: Request | None, accepted: asyncio.Future[asyncio.Future[Outcome]]
    ) -> None:
        try:
            operation, superseded = admit(self.instance, asked)
            instance = self._begun(replace(self.instance, operation=operation))
            puts = [Put(instance_key(instance.name), encode_instance(instance))]
            compares = []
            if request:
                put, compare = requests.beginning(asked.request_ids[0], replace(request, operation_id=operation.id))
                puts.append(put)
                compares.append(compare)
            lost = _superseded(asked)
            if superseded:
                puts += await requests.ending(self.world.store, superseded, lost)
            self.revision = await self.world.store.transact(puts, compares)
        except (VmherdError, StoreError) as error:
            if not accepted.cancelled():
                accepted.set_exception(error)
            return
        known = self.instance.operation
        self.instance = instance
        if operation.verb is Verb.START:
            self._forget_last_run()
        outcome = self._outcomes.setdefault(operation.id, asyncio.get_running_loop().create_future())
        if superseded:
            self._outcomes.pop(superseded.id).set_result(replace(lost, revision=self.revision))
        if not known or known.id != operation.id or known.force != operation.force:
            await _cancelled(self._driving)
            self._drive(operation)
        if not accepted.cancelled():
            accepted.set_result(outcome)
        self._notify()

    def _begun(self, instance: Instance) -> Instance:
        operation = instance.operation
        if operation and operation.verb is Verb.START:
            return started(instance, time.time())
        return replace(instance, state=lifecycle.after(instance.state, Event.STOP))

    def _forget_last_run(self) -> None:
        self.ended.clear()
        self.stop_step = None
        self._shutdown_reason = ""

    def _drive(self, operation: Operation) -> None:
        self._driving = asyncio.create_task(self._carry_out(operation))

    async def _carry_out(self, operation: Operation) -> None:
        error: VmherdError | None = None
        try:
            await driver.carry_out(operation, self)
        except VmherdError as raised:
            error = raised
        except Exception as raised:
            _log.exception("a command failed unexpectedly", name=self.instance.name, verb=operation.verb)
            error = InternalError(f"{operation.verb} failed; the controller's log has the details: {type(raised)}")
        self._inbox.put_nowait(lambda: self._settle(operation.id, error))

    async def _settle(self, operation_id: str, error: VmherdError | None) -> None:
        operation = self.instance.operation
        if not operation or operation.id != operation_id:
            return  # another command has put an end to it
        instance = replace(self.instance, operation=None)
        deleted = operation.verb is Verb.DELETE and error is None
        outcome = _failed(error) if error else Outcome(instance)

        async def puts() -> list[Put]:
            value = None if deleted else encode_instance(instance)
            ending = await requests.ending(self.world.store, operation, outcome)
            return [Put(instance_key(instance.name), value), *ending]

        await self._commit(puts)
        self.instance = instance
        self.deleted = deleted
        self._outcomes.pop(operation.id).set_result(replace(outcome, revision=self.revision))
        self._notify()

    # Messages: what was seen.

    async def _on_process(self, process: Process) -> None:
        if process.generation != self.instance.generation or self.instance.state not in lifecycle.ACTIVE:
            return
        if process.ended_at_s is not None:
            await self._on_end(*self._judge(process))
            return
        if not self._monitoring:
            self._monitoring = asyncio.create_task(self.monitor.run())
        await self._save(replace(self.instance, readiness=self._climbed(Rung.PROCESS)))

    async def _on_no_process(self) -> None:
        instance, operation = self.instance, self.instance.operation
        coming = operation and operation.verb in STARTING_VERBS and not instance.readiness.reached
        if instance.state in lifecycle.ACTIVE and not coming:
            gone = Process(instance.uid, instance.generation, pid=0, ended_at_s=time.time())
            await self._on_end(*self._judge(gone))
        self._notify()

    def _judge(self, process: Process) -> tuple[Event, Exit]:
        operation = self.instance.operation
        return judge(
            process,
            stop_step=self.stop_step,
            stopping=operation is not None and operation.verb not in STARTING_VERBS,
            shutdown_reason=self._shutdown_reason,
        )

    async def _on_end(self, event: Event, exit_: Exit) -> None:
        await _cancelled(self._monitoring)
        self._monitoring = None
        await self._on_agent(is_open=False)
        self.ended.set()
        await self._save(
            replace(
                self.instance,
                state=lifecycle.after(self.instance.state, event),
                last_exit=exit_,
                readiness=Readiness(),
                addresses=(),
            )
        )

    async def _on_lost(self) -> None:
        # With one of the two still there, what is known stays true.
        if not self.monitor.up and not self.world.helper.connected:
            await self._on_event(Event.LOST)

    async def _on_qmp_up(self, *, paused: bool, agent_open: bool) -> None:
        event = Event.UNDER_CONTROL_PAUSED if paused else Event.UNDER_CONTROL
        state = lifecycle.after(self.instance.state, event)
        if self.instance.operation and self.instance.operation.verb not in STARTING_VERBS:
            state = lifecycle.after(state, Event.STOP)  # found again in the middle of a stop
        await self._save(replace(self.instance, state=state, readiness=self._climbed(Rung.PROCESS, Rung.QMP)))
        await self._on_agent(is_open=agent_open)
        self._notify()

    async def _on_event(self, event: Event) -> None:
        await self._save(replace(self.instance, state=lifecycle.after(self.instance.state, event)))

    async def _on_shutdown(self, data: Mapping[str, object]) -> None:
        self._shutdown_reason = str(data.get("reason", "unknown"))
        await self._on_event(Event.GUEST_SHUTDOWN)

    async def _on_port(self, data: Mapping[str, object]) -> None:
        if data.get("id") == AGENT_PORT:
            await self._on_agent(is_open=data.get("open") is True)

    async def _on_agent(self, *, is_open: bool) -> None:
        if is_open and not self.agent_open:
            self._probing = asyncio.create_task(probe(self))  # begins after this message
        if not is_open:
            await _cancelled(self._probing)
            self._probing = None
            await self._save(replace(self.instance, readiness=self.instance.readiness.fall(Rung.QMP), addresses=()))
        self.agent_open = is_open
        self.agent.set_port_open(is_open)

    _EVENTS: Mapping[str, Callable[[Supervisor, Mapping[str, object]], Awaitable[None]]] = {
        "STOP": lambda self, _: self._on_event(Event.PAUSE),
        "RESUME": lambda self, _: self._on_event(Event.RESUME),
        "SHUTDOWN": _on_shutdown,
        "RESET": lambda self, _: self._on_agent(is_open=False),
        "VSERPORT_CHANGE": _on_port,
    }
    """What QEMU's events mean. https://qemu-project.gitlab.io/qemu/interop/qemu-qmp-ref.html"""

    # The record.

    def _climbed(self, *rungs: Rung) -> Readiness:
        readiness = self.instance.readiness
        for rung in rungs:
            readiness = readiness.climb(rung, now_s=time.time(), accepted_at_s=self.instance.accepted_at_s)
        return readiness

    async def _save(self, instance: Instance) -> None:
        if instance == self.instance:
            return
        self.instance = instance
        put = Put(instance_key(instance.name), encode_instance(instance))
        await self._commit(lambda: _ready([put]))
        self._notify()

    async def _commit(self, puts: Callable[[], Coroutine[None, None, list[Put]]]) -> None:
        """Stores what is true already, however long it takes."""
        while True:
            try:
                self.revision = await self.world.store.transact(await puts())
                return
            except StoreError as error:
                _log.error("cannot store what happened; trying again", name=self.instance.name, error=str(error))
                await asyncio.sleep(STORE_RETRY_S)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _toggle(self, event: Event, verb: str, command: str) -> None:
        check_state(self.instance, event, verb)
        before = self.instance.state
        await self.monitor.execute(command)
        try:
            async with asyncio.timeout(PAUSE_TIMEOUT_S):
                await self.until(lambda: self.instance.state != before)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"QEMU took the {verb} of {self.instance.name!r} and did not carry it out within {PAUSE_TIMEOUT_S:g} s",
                reason="PAUSE_TIMEOUT",
                metadata={"name": self.instance.name},
            ) from error


def _superseded(by: Operation) -> Outcome:
    return _failed(Aborted(f"a {by.verb} came in between", reason="SUPERSEDED", metadata={"by": by.verb}))


def _failed(error: VmherdError) -> Outcome:
    return Outcome(error=json_format.MessageToJson(to_status(error), indent=None))


async def _ready(puts: list[Put]) -> list[Put]:
    return puts


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    if task:
        task.cancel()
        await asyncio.wait([task])
