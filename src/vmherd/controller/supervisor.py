"""One instance, supervised by one task.

Everything that happens to an instance becomes a message in its inbox: accepted commands, what QEMU and the helper
tell, what the guest agent answers. One task takes them in turn and is the only writer of the instance's record, so
nothing here needs a lock. What takes long is done by tasks beside it that act and tell the inbox: `driver` carries a
command out, `probe` looks for the guest agent.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import structlog

from vmherd.controller import driver, requests
from vmherd.controller.address_book import AddressBook
from vmherd.controller.admission import admit
from vmherd.controller.exits import judge
from vmherd.controller.freeze import Freezer
from vmherd.controller.happening import Happening, happening_of
from vmherd.controller.helper import Process
from vmherd.controller.host_probe import HostProbe
from vmherd.controller.inbox import Inbox, Message
from vmherd.controller.instance_record import InstanceRecord
from vmherd.controller.monitor import Monitor
from vmherd.controller.probe import Probe
from vmherd.controller.qemu_events import meaning_of
from vmherd.controller.records import Outcome, Request, encode_instance, instance_key
from vmherd.controller.store import Put
from vmherd.controller.tasks import cancelled, spawn
from vmherd.controller.usernet import bound_ports
from vmherd.controller.world import World
from vmherd.guest_agent import GuestAgent
from vmherd.model import lifecycle
from vmherd.model.errors import VmherdError, agent_out_of_reach, instance_not_found
from vmherd.model.instance import Exit, Instance, Operation, StopStep, Verb, bound, started
from vmherd.model.lifecycle import AGENT_STATES, Event, State
from vmherd.model.readiness import Readiness, Rung

_log = structlog.get_logger()

STARTING_VERBS = frozenset({Verb.LAUNCH, Verb.START})
ENDING_VERBS = frozenset(Verb) - STARTING_VERBS


class Supervisor:
    """Supervises one instance."""

    def __init__(self, world: World, instance: Instance, revision: int) -> None:
        run = world.run.instance(instance.uid)
        self.world = world
        self.deleted = False
        self.ended = asyncio.Event()
        """Set while no QEMU process of the current generation can be alive."""
        self.stop_step: StopStep | None = None
        self.monitor = Monitor(run.qmp, instance.name, self)
        self.happened: Counter[Happening] = Counter()
        """How often each of these has happened: who waits for the next one counts before, and misses none."""
        self._record = InstanceRecord(world.store, instance, revision)
        self._inbox = Inbox(instance.name)
        self._agent = GuestAgent(run.agent)
        book = AddressBook(self._record)
        self._probe = Probe(self._agent, self._record, book, self._inbox)
        self._host_probe = HostProbe(world.helper, self._record, book, self._inbox)
        self.freezer = Freezer(self._agent, self._record, self._inbox)
        self._outcomes: dict[str, asyncio.Future[Outcome]] = {}
        self._driving: asyncio.Task[None] | None = None
        self._monitoring: asyncio.Task[None] | None = None
        self._shutdown_reason = ""
        if instance.state not in lifecycle.ACTIVE:
            self.ended.set()
        if instance.operation:
            self._outcomes[instance.operation.id] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Supervises until the instance is deleted or the task cancelled; takes up what an earlier task left."""
        if self.instance.state in lifecycle.ACTIVE and not self._is_under_way(STARTING_VERBS):
            self._watch_qemu()
        if self.instance.operation:
            self._drive(self.instance.operation)
        self.freezer.take_up()
        try:
            await self._inbox.serve(lambda: self.deleted)
        finally:
            await cancelled(self._driving)
            await cancelled(self._monitoring)
            await self._probe.close()
            await self._host_probe.end()
            await self.freezer.close()
            await self._agent.close()

    # What is known.

    @property
    def instance(self) -> Instance:
        """The instance as it is now."""
        return self._record.instance

    @property
    def revision(self) -> int:
        """The store's revision of the instance."""
        return self._record.revision

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of the instance; another one stands here from then on."""
        return self._record.changed

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition on this supervisor holds."""
        await self._record.until(condition)

    # What the herd asks of it.

    async def submit(self, operation: Operation, request: Request | None = None) -> Outcome:
        """Accepts a command, carries it out and says what came of it. A cancelled caller stops nothing.

        Raises:
            NotFound: the instance was deleted in the meantime.
            FailedPrecondition: the instance's state forbids it.
            ResourceExhausted: too many have asked for it already.
            StoreError: it could not be stored, or the request's id was used in the meantime (`Conflict`).
        """
        outcome = await self._inbox.ask(lambda: self._accept(operation, request))
        return await asyncio.shield(outcome)

    async def outcome(self, operation_id: str) -> Outcome:
        """Waits for what comes of a command that is under way; raises `LookupError` when it is not."""
        return await asyncio.shield(self._outcomes[operation_id])

    async def pause(self) -> None:
        """Halts the virtual CPUs."""
        await driver.toggle(self, Event.PAUSE)

    async def resume(self) -> None:
        """Lets the virtual CPUs run on, or wakes the guest."""
        await driver.toggle(self, Event.RESUME)

    async def set_autostart(self, autostart: bool) -> None:
        """Says whether the instance is started when the host has booted; raises `NotFound`, `StoreError`."""
        await self._inbox.ask(lambda: self._set_autostart(autostart))

    def open_agent(self) -> GuestAgent:
        """The guest agent's client, for a command right now.

        Raises:
            FailedPrecondition: the instance does not run.
        """
        if self.instance.state not in AGENT_STATES:
            raise agent_out_of_reach(self.instance.name, self.instance.state, AGENT_STATES)
        return self._agent

    # What the helper tells (`helper.Listener`, one instance's part of it).

    def process_seen(self, process: Process) -> None:
        """The helper knows this process."""
        self._inbox.put(lambda: self._on_process(process))

    def process_not_seen(self) -> None:
        """The helper was reached and knows no process of this instance."""
        self._inbox.put(self._on_no_process)

    def helper_lost(self) -> None:
        """The helper cannot be reached."""
        self._inbox.put(self._on_lost)

    # What QEMU tells (`monitor.Sink`).

    @property
    def asks_usernet(self) -> bool:
        """Whether nobody knows yet which ports of the host lead into the guest."""
        return not all(nic.ports_known for nic in self.instance.nics)

    def qmp_up(self, *, found: Event, agent_open: bool, usernet: str) -> None:
        """QEMU answers; this is how it is."""
        self._from_qemu(lambda: self._on_qmp_up(found, usernet, agent_open=agent_open))

    def qmp_down(self) -> None:
        """QEMU hung up. Whether it ended is for the helper to say."""
        self._from_qemu(self._on_lost)

    def qmp_event(self, name: str, data: Mapping[str, object]) -> None:
        """QEMU has told an event."""
        self._from_qemu(lambda: self._on_told(name, data))

    def _from_qemu(self, message: Message) -> None:
        """Puts in what this run's QEMU told; the next run must not take it for its own."""
        generation = self.instance.generation

        async def handle() -> None:
            if self._runs(generation):
                await message()

        self._inbox.put(handle)

    # What the driver tells.

    def process_started(self, process: Process) -> None:
        """The helper has answered a start with this process."""
        self._inbox.put(lambda: self._on_started(process))

    async def start_again(self) -> None:
        """The first half of a restart is done: from here on it is a start."""
        await self._inbox.ask(self._on_half_restarted)

    async def start_failed(self, exit_: Exit) -> None:
        """There is no process, and there will be none."""
        await self._inbox.ask(lambda: self._on_end(Event.START_FAILED, exit_))

    # Messages: commands.

    async def _accept(self, asked: Operation, request: Request | None) -> asyncio.Future[Outcome]:
        if self.deleted:
            raise instance_not_found(self.instance.name)
        operation, superseded = admit(self.instance, asked)
        instance = self._begun(replace(self.instance, operation=operation))
        puts = [Put(instance_key(instance.name), encode_instance(instance))]
        compares = []
        if request:
            put, compare = requests.beginning(asked.request_ids[0], replace(request, operation_id=operation.id))
            puts.append(put)
            compares.append(compare)
        lost = requests.superseded(asked)
        if superseded:
            puts += await requests.ending(self.world.store, superseded, lost)
        revision = await self.world.store.transact(puts, compares)
        known = self.instance.operation
        self._record.instance, self._record.revision = instance, revision
        if operation.verb is Verb.START:
            self._forget_last_run()
        outcome = self._outcomes.setdefault(operation.id, asyncio.get_running_loop().create_future())
        if superseded:
            self._outcomes.pop(superseded.id).set_result(replace(lost, revision=revision))
        if not known or known.id != operation.id or known.force != operation.force:
            await cancelled(self._driving)
            self._drive(operation)
        self._record.notify()
        return outcome

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
        self._driving = spawn(self._carry_out(operation), f"{operation.verb} of {self.instance.name}")

    async def _carry_out(self, operation: Operation) -> None:
        error = await driver.carry_out(operation, self)
        self._inbox.put(lambda: self._settle(operation.id, error))

    async def _settle(self, operation_id: str, error: VmherdError | None) -> None:
        operation = self.instance.operation
        if not operation or operation.id != operation_id:
            return  # another command has put an end to it
        instance = replace(self.instance, operation=None)
        deleted = operation.verb is Verb.DELETE and error is None
        outcome = requests.failed(error) if error else Outcome(instance)

        async def puts() -> list[Put]:
            value = None if deleted else encode_instance(instance)
            ending = await requests.ending(self.world.store, operation, outcome)
            return [Put(instance_key(instance.name), value), *ending]

        await self._record.commit(puts)
        self._record.instance = instance
        self.deleted = deleted
        self._outcomes.pop(operation.id).set_result(replace(outcome, revision=self.revision))
        self._record.notify()

    async def _set_autostart(self, autostart: bool) -> None:
        if self.deleted:
            raise instance_not_found(self.instance.name)
        if autostart != self.instance.autostart:
            await self._record.intend(replace(self.instance, autostart=autostart))

    async def _on_half_restarted(self) -> None:
        operation = self.instance.operation
        if operation and operation.verb is Verb.RESTART:
            self._forget_last_run()
            await self._record.save(self._begun(replace(self.instance, operation=replace(operation, verb=Verb.START))))

    # Messages: what was seen.

    async def _on_process(self, process: Process) -> None:
        if self._runs(process.generation):
            await (self._on_running() if process.ended_at_s is None else self._on_ended(process))
        self._record.notify()

    async def _on_started(self, process: Process) -> None:
        if self._runs(process.generation):
            self._watch_qemu()
        await self._on_process(process)

    async def _on_running(self) -> None:
        if not self._is_under_way(STARTING_VERBS):
            self._watch_qemu()
        lost = self.instance.state is State.UNKNOWN  # QEMU corrects this as soon as it can be asked as well
        state = self._found(Event.UNDER_CONTROL) if lost else self.instance.state
        await self._record.save(replace(self.instance, state=state, readiness=self._record.climbed(Rung.PROCESS)))

    async def _on_ended(self, process: Process) -> None:
        async def judge_it() -> None:
            if self._runs(process.generation):
                await self._on_end(*self._judge(process))

        # QEMU's last words say why it ended. Once it has hung up they are in the inbox, and so before this.
        await self.monitor.hung_up()
        self._inbox.put(judge_it)

    async def _on_no_process(self) -> None:
        instance = self.instance
        if self.monitor.up:
            _log.error("the helper does not know a machine that runs", name=instance.name, uid=instance.uid)
        elif instance.state in lifecycle.ACTIVE and not self._is_under_way(STARTING_VERBS):
            gone = Process(instance.uid, instance.generation, pid=0, ended_at_s=time.time())
            await self._on_end(*self._judge(gone))
        self._record.notify()

    def _judge(self, process: Process) -> tuple[Event, Exit]:
        return judge(
            process,
            came_up=(self.instance.readiness.reached or 0) >= Rung.QMP,
            stop_step=self.stop_step,
            stopping=self._is_under_way(ENDING_VERBS),
            shutdown_reason=self._shutdown_reason,
        )

    async def _on_end(self, event: Event, exit_: Exit) -> None:
        await cancelled(self._monitoring)
        self._monitoring = None
        await self._host_probe.end()
        await self._probe.set_port_open(False, f"its machine has ended: {exit_.detail}")
        await self.freezer.forget()
        self.ended.set()
        await self._record.save(
            replace(
                self.instance,
                state=lifecycle.after(self.instance.state, event),
                last_exit=exit_,
                readiness=Readiness(),
                addresses=(),
                nics=bound(self.instance.nics),
            )
        )

    async def _on_lost(self) -> None:
        # With one of the two still there what is known stays true, and a start waits until both are.
        nobody = self.world.helper.lost and not self.monitor.up
        if nobody and not self._is_under_way(STARTING_VERBS):
            await self._on_event(Event.LOST)

    async def _on_qmp_up(self, found: Event, usernet: str, *, agent_open: bool) -> None:
        readiness = self._record.climbed(Rung.PROCESS, Rung.QMP)
        nics = self.instance.nics
        if usernet:
            nics = bound(nics, bound_ports(usernet, nics))
        await self._record.save(replace(self.instance, state=self._found(found), readiness=readiness, nics=nics))
        if self.asks_usernet:
            _log.warning("QEMU did not tell which ports it has bound", name=self.instance.name)
        self._host_probe.begin()
        await self._probe.set_port_open(agent_open)
        self._record.notify()

    async def _on_told(self, name: str, data: Mapping[str, object]) -> None:
        meaning = meaning_of(name, data)
        if meaning.agent_left:
            await self._probe.set_port_open(False, meaning.agent_left)
        if meaning.agent_came:
            await self._probe.set_port_open(True)
        if meaning.was_reset:
            await self.freezer.forget()
        self._shutdown_reason = meaning.shutdown_reason or self._shutdown_reason
        if meaning.event:
            await self._on_event(meaning.event)
        if happening := happening_of(name, data):
            self.happened[happening] += 1
            self._record.notify()

    async def _on_event(self, event: Event) -> None:
        await self._record.save(replace(self.instance, state=lifecycle.after(self.instance.state, event)))

    # Inside.

    def _runs(self, generation: int) -> bool:
        return generation == self.instance.generation and self.instance.state in lifecycle.ACTIVE

    def _is_under_way(self, verbs: frozenset[Verb]) -> bool:
        return self.instance.operation is not None and self.instance.operation.verb in verbs

    def _found(self, event: Event) -> State:
        """The state after finding the machine, also when that was in the middle of a stop."""
        state = lifecycle.after(self.instance.state, event)
        return lifecycle.after(state, Event.STOP) if self._is_under_way(ENDING_VERBS) else state

    def _watch_qemu(self) -> None:
        self._monitoring = self._monitoring or spawn(self.monitor.run(), f"monitor of {self.instance.name}")
