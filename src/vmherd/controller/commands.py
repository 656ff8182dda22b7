"""The agent's commands with what the wire does not give: when they are done, and what vmherd has to keep in mind."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from vmherd.controller.freeze import THAW_AFTER_DEFAULT_S
from vmherd.controller.happening import Happening
from vmherd.controller.supervisor import Supervisor
from vmherd.guest_agent import AgentError, AgentNotConnected, AgentUnresponsive, CommandFailed
from vmherd.model.readiness import Rung

SHUTDOWN_MODES = MappingProxyType(
    {
        "powerdown": frozenset({Happening.SHUTDOWN}),
        "reboot": frozenset({Happening.RESET}),
        "halt": frozenset({Happening.AGENT_LEFT}),  # nothing else is seen of it: QEMU runs on, and so may its CPUs
    }
)
"""What completes guest-shutdown in each of its modes."""

SUSPENDS = MappingProxyType(
    {
        "guest-suspend-ram": frozenset({Happening.SUSPEND}),
        "guest-suspend-hybrid": frozenset({Happening.SUSPEND}),
        "guest-suspend-disk": frozenset({Happening.SUSPEND_DISK, Happening.SHUTDOWN}),
    }
)
"""What completes the commands that suspend."""

FREEZES = frozenset({"guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list"})

GOING_DOWN_TIMEOUT_S = 120.0
"""How long a guest may take to end or to suspend itself; a full distribution under emulation needs some 20 s."""


def timeout_default_s(command: str, agent_timeout_s: float) -> float:
    """How long a command may take when its caller does not say."""
    return GOING_DOWN_TIMEOUT_S if command == "guest-shutdown" or command in SUSPENDS else agent_timeout_s


async def execute(
    supervisor: Supervisor,
    command: str,
    arguments: Mapping[str, object],
    *,
    timeout_s: float,
    thaw_after_s: float = THAW_AFTER_DEFAULT_S,
) -> object:
    """Carries out one of the agent's commands and gives its JSON value.

    Commands that the agent does not answer when they succeed are done when QEMU says so, and give an empty object.
    A freeze ends after `thaw_after_s` at the latest.

    Raises:
        FailedPrecondition: the instance does not run.
        ResourceExhausted: a freeze's end could not be stored; nothing was frozen.
        AgentError: what the agent's client raises; AgentUnresponsive also when a guest took a command and did not
            carry it out in time, and AgentNotConnected when it ended otherwise.
    """
    agent = supervisor.open_agent()
    if command in FREEZES:
        return await supervisor.freezer.freeze(command, arguments, timeout_s=timeout_s, thaw_after_s=thaw_after_s)
    if command == "guest-fsfreeze-thaw":
        return await supervisor.freezer.thaw(timeout_s=timeout_s)
    if completion := _completion(command, arguments):
        return await _execute_silent(supervisor, command, arguments, completion, timeout_s=timeout_s)
    return await agent.execute(command, arguments, timeout_s=timeout_s)


def _completion(command: str, arguments: Mapping[str, object]) -> frozenset[Happening] | None:
    """What completes a command that is not answered; None for all others, and for modes that no agent knows."""
    if command == "guest-shutdown":
        return SHUTDOWN_MODES.get(str(arguments.get("mode", "powerdown")))
    return SUSPENDS.get(command)


async def _execute_silent(
    supervisor: Supervisor,
    command: str,
    arguments: Mapping[str, object],
    completion: frozenset[Happening],
    *,
    timeout_s: float,
) -> object:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    generation, before = supervisor.instance.generation, Counter(supervisor.happened)
    agent_since_s = _agent_since_s(supervisor)

    def done() -> bool:
        return any(supervisor.happened[happening] > before[happening] for happening in completion)

    def ended() -> bool:
        return supervisor.ended.is_set() or supervisor.instance.generation != generation

    def goes_on() -> bool:
        # On its way the guest has closed the agent's port, and what the agent said of its failure was lost with that.
        return command in SUSPENDS and _agent_since_s(supervisor) not in (None, agent_since_s)

    sending = asyncio.create_task(supervisor.open_agent().send(command, arguments, timeout_s=timeout_s))
    happening = asyncio.create_task(supervisor.until(lambda: done() or ended() or goes_on()))
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.wait((sending, happening), return_when=asyncio.FIRST_COMPLETED)
            if not happening.done():
                _raise_if_refused(sending)
                await happening
    except TimeoutError as error:
        await asyncio.wait((sending,))  # whose time is up at this moment as well
        _raise_if_refused(sending)  # for instance it was never sent, since the agent was busy
        raise AgentUnresponsive(
            f"{command}: {' and '.join(sorted(completion))} within {timeout_s:.3g} s",
            command=command,
            elapsed_s=loop.time() - started_s,
            outcome_unknown=True,
        ) from error
    finally:
        sending.cancel()
        happening.cancel()
        await asyncio.gather(sending, happening, return_exceptions=True)
    if not done() and not ended():
        raise CommandFailed(
            "GenericError",
            "the guest did not stay suspended: its agent is back",
            command=command,
            elapsed_s=loop.time() - started_s,
        )
    if not done():
        raise AgentNotConnected(
            f"{command}: the machine has ended otherwise",
            command=command,
            elapsed_s=loop.time() - started_s,
            outcome_unknown=True,
        )
    return {}


def _agent_since_s(supervisor: Supervisor) -> float | None:
    """Since when there is an agent that answers."""
    return next((step.reached_at_s for step in supervisor.instance.readiness.steps if step.rung is Rung.AGENT), None)


def _raise_if_refused(sending: asyncio.Task[None]) -> None:
    """Passes on an error after which the guest does nothing; the agent's silence and its end are none."""
    error = sending.exception()
    if error and not (isinstance(error, AgentError) and error.outcome_unknown):
        raise error
